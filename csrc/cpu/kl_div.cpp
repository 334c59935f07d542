// torch.ops.fastkd.kl_div on the CPU: rows in parallel, each by the kernel of the best instruction set.
#include "cpu/kl_div.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/rows.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"
#include "simd/dispatch.h"

#define FASTKD_SOURCE "simd/kl_div.h"
#include "simd/foreach_target.h"

namespace fastkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 14;  // logits per task: below that a thread costs more than it brings

void run(const KlDivTask& task) {
  const auto kernel = FASTKD_PICK(kl_div);
  constexpr int64_t kTile = 16;  // rows that may share a tile
  const int64_t floats = scratch_floats(task.vocabulary);
  if (task.rows * task.vocabulary <= kGrain) return kernel(task, 0, task.rows, scratch(floats));
  const int64_t width = task.vocabulary < kGrain / kTile ? kTile : 1, units = (task.rows + width - 1) / width;
  const int64_t grain = kGrain / (width * task.vocabulary) + 1;
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    kernel(task, begin * width, end * width < task.rows ? end * width : task.rows, scratch(floats));
  });
}

// The public function checks labels too, with a better message; here nothing but a read out of bounds is at stake.
void check_labels(const KlDivTask& task) {
  for (int64_t i = 0; task.labels && i < task.rows; ++i)
    STD_TORCH_CHECK((task.valid && !task.valid[i]) || (task.labels[i] >= 0 && task.labels[i] < task.vocabulary),
                    "fastkd::kl_div: labels must lie in [0, V) in valid rows");
}

struct Result {
  Tensor loss, stats;
};

// Fills grad, (N, V) contiguous, where there is one.
Result evaluate(const Tensor& student_in, const Tensor& teacher_in, const std::optional<Tensor>& row_temperature,
                double temperature, int64_t divergence, double beta, const std::optional<Tensor>& valid,
                const std::optional<Tensor>& labels, double cross_entropy_weight, int64_t reduction,
                const std::optional<Tensor>& denominator, bool scale_by_temperature, const std::optional<Tensor>& grad,
                bool need_stats) {
  using namespace torch::stable;
  STD_TORCH_CHECK(student_in.dim() == 2 && teacher_in.dim() == 2 && student_in.size(0) == teacher_in.size(0) &&
                      student_in.size(1) == teacher_in.size(1) && student_in.scalar_type() == teacher_in.scalar_type(),
                  "fastkd::kl_div takes two (N, V) tensors of one shape and dtype");
  const Tensor student = dense_rows(student_in), teacher = dense_rows(teacher_in);
  const int64_t rows = student.size(0);
  const Values<float> temperatures(row_temperature, rows, ScalarType::Float, "row_temperature");
  const Values<bool> counted(valid, rows, ScalarType::Bool, "valid");
  const Values<int64_t> classes(labels, rows, ScalarType::Long, "labels");
  const Tensor stats =
      need_stats ? new_zeros(student, {4, rows}, ScalarType::Float) : new_empty(student, {0}, ScalarType::Float);
  const RowLosses losses(student, rows, reduction, denominator);
  KlDivTask task{};
  task.student = student.data_ptr();
  task.teacher = teacher.data_ptr();
  task.grad = grad ? grad->mutable_data_ptr() : nullptr;
  task.loss = losses.data();
  task.stats = need_stats ? (float*)stats.mutable_data_ptr() : nullptr;
  task.rows = rows;
  task.vocabulary = student.size(1);
  task.student_stride = student.stride(0);
  task.teacher_stride = teacher.stride(0);
  task.row_temperature = temperatures.data();
  task.valid = counted.data();
  task.labels = classes.data();
  task.temperature = (float)temperature;
  task.beta = (float)beta;
  task.cross_entropy_weight = (float)cross_entropy_weight;
  task.scale_by_temperature = scale_by_temperature;
  task.dtype = dtype_of(student, "kl_div");
  task.divergence = (Divergence)divergence;
  task.grad_scale = (float)losses.grad_scale(task.dtype);
  check_labels(task);
  if (rows > 0) run(task);
  return {losses.reduced(), stats};
}

std::tuple<Tensor, Tensor, Tensor> kl_div(const Tensor& student, const Tensor& teacher,
                                          std::optional<Tensor> row_temperature, double temperature, int64_t divergence,
                                          double beta, std::optional<Tensor> valid, std::optional<Tensor> labels,
                                          double cross_entropy_weight, int64_t reduction,
                                          std::optional<Tensor> denominator, bool scale_by_temperature, bool need_grad,
                                          bool need_stats) {
  STD_TORCH_CHECK(student.dim() == 2, "fastkd::kl_div takes two (N, V) tensors of one shape and dtype");
  const std::optional<Tensor> grad = need_grad ? std::optional<Tensor>(new_gradient(student)) : std::nullopt;
  const Result result = evaluate(student, teacher, row_temperature, temperature, divergence, beta, valid, labels,
                                 cross_entropy_weight, reduction, denominator, scale_by_temperature, grad, need_stats);
  return {result.loss, grad ? *grad : torch::stable::new_empty(student, {0}), result.stats};
}

// The same with the gradient in place of the student's logits.
std::tuple<Tensor, Tensor> kl_div_(const Tensor& student, const Tensor& teacher, std::optional<Tensor> row_temperature,
                                   double temperature, int64_t divergence, double beta, std::optional<Tensor> valid,
                                   std::optional<Tensor> labels, double cross_entropy_weight, int64_t reduction,
                                   std::optional<Tensor> denominator, bool scale_by_temperature, bool need_stats) {
  STD_TORCH_CHECK(student.is_contiguous(), "fastkd::kl_div_ takes contiguous student logits");
  const Result result =
      evaluate(student, teacher, row_temperature, temperature, divergence, beta, valid, labels, cross_entropy_weight,
               reduction, denominator, scale_by_temperature, student, need_stats);
  return {result.loss, result.stats};
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("kl_div", TORCH_BOX(&fastkd::kl_div));
  m.impl("kl_div_", TORCH_BOX(&fastkd::kl_div_));
}
