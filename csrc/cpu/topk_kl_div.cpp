// torch.ops.fastkd.topk_kl_div on the CPU: rows in parallel, each by the kernel of the best instruction set.
#include "cpu/topk_kl_div.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <tuple>

#include "cpu/huge_pages.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"
#include "simd/dispatch.h"

#define FASTKD_SOURCE "simd/topk_kl_div.h"
#include "simd/foreach_target.h"

namespace fastkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 14;  // columns per task: below that a thread costs more than it brings

void run(const TopkKlDivTask& task) {
  const auto kernel = FASTKD_PICK(topk_kl_div);
  const bool whole_rows = task.grad || task.outcomes > task.k;
  const int64_t work = (whole_rows ? task.vocabulary : 0) + 16 * task.outcomes;
  const int64_t floats = scratch_floats(task.vocabulary, task.outcomes);
  if (task.rows * work <= kGrain) return kernel(task, 0, task.rows, scratch(floats));
  torch::stable::parallel_for(0, task.rows, kGrain / work + 1,
                              [&](int64_t begin, int64_t end) { kernel(task, begin, end, scratch(floats)); });
}

// The public function checks ids too, with a better message; here nothing but memory out of bounds is at stake.
void check_ids(const TopkKlDivTask& task) {
  for (int64_t row = 0; row < task.rows; ++row) {
    int64_t least = -1;
    for (int64_t j = 0; j < task.k; ++j) {
      const int64_t id = task.ids[row * task.k + j];
      STD_TORCH_CHECK(id >= least && id < task.vocabulary,
                      "fastkd::topk_kl_div: ids must ascend in each row and lie in [-1, V)");
      least = id;
    }
  }
}

// Fills grad, (N, V) contiguous, where there is one.
Tensor evaluate(const Tensor& student_in, const Tensor& ids_in, const Tensor& teacher_in,
                std::optional<Tensor> row_temperature, double temperature, int64_t divergence, double beta,
                std::optional<Tensor> valid, std::optional<Tensor> row_weight, int64_t reduction,
                const std::optional<Tensor>& denominator, bool scale_by_temperature,
                const std::optional<Tensor>& grad) {
  using namespace torch::stable;
  STD_TORCH_CHECK(student_in.dim() == 2 && ids_in.dim() == 2 && teacher_in.dim() == 2 &&
                      ids_in.size(0) == student_in.size(0) && teacher_in.size(0) == student_in.size(0) &&
                      ids_in.scalar_type() == ScalarType::Long && teacher_in.scalar_type() == ScalarType::Float,
                  "fastkd::topk_kl_div takes (N, V) logits, (N, k) int64 ids and a float32 teacher of N rows");
  const Tensor student = dense_rows(student_in), ids = contiguous(ids_in), teacher = contiguous(teacher_in);
  TopkKlDivTask task{};
  task.rows = student.size(0);
  task.vocabulary = student.size(1);
  task.k = ids.size(1);
  task.outcomes = teacher.size(1);
  STD_TORCH_CHECK(task.outcomes == task.k || task.outcomes == task.k + 1,
                  "fastkd::topk_kl_div: the teacher must have k or k + 1 columns");
  const auto vector = [&](const std::optional<Tensor>& v, ScalarType type, const char* name) -> std::optional<Tensor> {
    if (!v) return v;
    STD_TORCH_CHECK(v->dim() == 1 && v->size(0) == task.rows && v->scalar_type() == type, "fastkd::topk_kl_div: ", name,
                    " must hold one value per row");
    return contiguous(*v);
  };
  row_temperature = vector(row_temperature, ScalarType::Float, "row_temperature");
  valid = vector(valid, ScalarType::Bool, "valid");
  row_weight = vector(row_weight, ScalarType::Float, "row_weight");

  Tensor loss = reduction == kNone ? new_empty(student, {task.rows}, ScalarType::Float)
                                   : new_empty(student, {}, ScalarType::Float);
  std::unique_ptr<float[]> unreduced(reduction == kNone ? nullptr : new float[task.rows]);
  const double count = denominator ? *(const float*)denominator->data_ptr() : (double)task.rows;
  const double scale = reduction == kMean ? (count == 0 ? 0.0 : 1.0 / count) : 1.0;
  task.student = student.data_ptr();
  task.ids = (const int64_t*)ids.data_ptr();
  task.teacher = (const float*)teacher.data_ptr();
  task.grad = grad ? grad->mutable_data_ptr() : nullptr;
  task.loss = reduction == kNone ? (float*)loss.mutable_data_ptr() : unreduced.get();
  task.student_stride = student.stride(0);
  task.row_temperature = row_temperature ? (const float*)row_temperature->data_ptr() : nullptr;
  task.valid = valid ? (const bool*)valid->data_ptr() : nullptr;
  task.row_weight = row_weight ? (const float*)row_weight->data_ptr() : nullptr;
  task.temperature = (float)temperature;
  task.beta = (float)beta;
  task.scale_by_temperature = scale_by_temperature;
  task.dtype = dtype_of(student, "topk_kl_div");
  task.divergence = (Divergence)divergence;
  // Half precision would flush a gradient divided by the count to zero: there the division comes after, in Python.
  task.grad_scale = task.dtype == Dtype::float16 ? 1.0f : (float)scale;
  check_ids(task);
  if (task.rows > 0) run(task);
  if (reduction != kNone) *(float*)loss.mutable_data_ptr() = (float)(scale * sum(task.loss, task.rows));
  return loss;
}

std::tuple<Tensor, Tensor> topk_kl_div(const Tensor& student, const Tensor& ids, const Tensor& teacher,
                                       std::optional<Tensor> row_temperature, double temperature, int64_t divergence,
                                       double beta, std::optional<Tensor> valid, std::optional<Tensor> row_weight,
                                       int64_t reduction, std::optional<Tensor> denominator, bool scale_by_temperature,
                                       bool need_grad) {
  const auto new_grad = [&] {
    const Tensor grad = torch::stable::new_empty(student, {student.size(0), student.size(1)});
    prefer_huge_pages(grad.mutable_data_ptr(), grad.numel() * grad.element_size());
    return grad;
  };
  STD_TORCH_CHECK(student.dim() == 2, "fastkd::topk_kl_div takes (N, V) logits");
  const std::optional<Tensor> grad = need_grad ? std::optional<Tensor>(new_grad()) : std::nullopt;
  const Tensor loss = evaluate(student, ids, teacher, row_temperature, temperature, divergence, beta, valid, row_weight,
                               reduction, denominator, scale_by_temperature, grad);
  return {loss, grad ? *grad : torch::stable::new_empty(student, {0})};
}

// The same with the gradient in place of the student's logits.
Tensor topk_kl_div_(const Tensor& student, const Tensor& ids, const Tensor& teacher,
                    std::optional<Tensor> row_temperature, double temperature, int64_t divergence, double beta,
                    std::optional<Tensor> valid, std::optional<Tensor> row_weight, int64_t reduction,
                    std::optional<Tensor> denominator, bool scale_by_temperature) {
  STD_TORCH_CHECK(student.is_contiguous(), "fastkd::topk_kl_div_ takes contiguous student logits");
  return evaluate(student, ids, teacher, row_temperature, temperature, divergence, beta, valid, row_weight, reduction,
                  denominator, scale_by_temperature, student);
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("topk_kl_div", TORCH_BOX(&fastkd::topk_kl_div));
  m.impl("topk_kl_div_", TORCH_BOX(&fastkd::topk_kl_div_));
}
