// torch.ops.fastkd.topk_kl_div on the CPU: rows in parallel, each by the kernel of the best instruction set.
#include "cpu/topk_kl_div.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

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
                const std::optional<Tensor>& row_temperature, double temperature, int64_t divergence, double beta,
                const std::optional<Tensor>& valid, const std::optional<Tensor>& row_weight, int64_t reduction,
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
  const Values<float> temperatures(row_temperature, task.rows, ScalarType::Float, "row_temperature");
  const Values<bool> counted(valid, task.rows, ScalarType::Bool, "valid");
  const Values<float> weights(row_weight, task.rows, ScalarType::Float, "row_weight");
  const RowLosses losses(student, task.rows, reduction, denominator);
  task.student = student.data_ptr();
  task.ids = (const int64_t*)ids.data_ptr();
  task.teacher = (const float*)teacher.data_ptr();
  task.grad = grad ? grad->mutable_data_ptr() : nullptr;
  task.loss = losses.data();
  task.student_stride = student.stride(0);
  task.row_temperature = temperatures.data();
  task.valid = counted.data();
  task.row_weight = weights.data();
  task.temperature = (float)temperature;
  task.beta = (float)beta;
  task.scale_by_temperature = scale_by_temperature;
  task.dtype = dtype_of(student, "topk_kl_div");
  task.divergence = (Divergence)divergence;
  task.grad_scale = (float)losses.grad_scale(task.dtype);
  check_ids(task);
  if (task.rows > 0) run(task);
  return losses.reduced();
}

std::tuple<Tensor, Tensor> topk_kl_div(const Tensor& student, const Tensor& ids, const Tensor& teacher,
                                       std::optional<Tensor> row_temperature, double temperature, int64_t divergence,
                                       double beta, std::optional<Tensor> valid, std::optional<Tensor> row_weight,
                                       int64_t reduction, std::optional<Tensor> denominator, bool scale_by_temperature,
                                       bool need_grad) {
  STD_TORCH_CHECK(student.dim() == 2, "fastkd::topk_kl_div takes (N, V) logits");
  const std::optional<Tensor> grad = need_grad ? std::optional<Tensor>(new_gradient(student)) : std::nullopt;
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
