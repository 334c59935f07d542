// torch.ops.fastkd.mse on the CPU: pair after pair, the rows of each in parallel by the kernel of the best target.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/rows.h"
#include "cpu/squared_error.h"
#include "cpu/tensor.h"

namespace fastkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 14;  // elements per task: below that a thread costs more than it brings

// Sum of the rows' mean squares, in order, so that it does not depend on the number of threads.
double pair_loss(const Tensor& student_in, const Tensor& teacher_in, const float* scale, float factor, void* grad) {
  const Tensor student = dense_rows(student_in), teacher = dense_rows(teacher_in);
  const int64_t rows = student.size(0), columns = student.size(1);
  std::vector<float> losses(rows);
  SquaredErrorTask task{};
  task.prediction = student.data_ptr();
  task.target = teacher.data_ptr();
  task.scale = scale;
  task.factor = factor;
  task.grad = grad;
  task.loss = losses.data();
  task.columns = columns;
  task.prediction_stride = student.stride(0);
  task.target_stride = teacher.stride(0);
  task.dtype = task.prediction_dtype = task.grad_dtype = dtype_of(student, "mse");
  torch::stable::parallel_for(0, rows, kGrain / columns + 1,
                              [&](int64_t begin, int64_t end) { squared_error(task, begin, end); });
  double total = 0;
  for (float loss : losses) total += loss;
  return total;
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> mse(std::vector<Tensor> students, std::vector<Tensor> teachers,
                                                    std::optional<Tensor> valid, Tensor weights, Tensor denominators,
                                                    std::vector<bool> need_grad) {
  using namespace torch::stable;
  const int64_t pairs = students.size();
  STD_TORCH_CHECK(pairs > 0 && pairs == (int64_t)teachers.size() && pairs == (int64_t)need_grad.size(),
                  "fastkd::mse takes one teacher and one flag per student");
  const Tensor total = new_empty(students[0], {}, ScalarType::Float);
  const Tensor parts = new_empty(students[0], {pairs}, ScalarType::Float);
  const Values<float> weight_of(weights, pairs, ScalarType::Float, "weights");
  const Values<float> count_of(denominators, pairs, ScalarType::Float, "denominators");
  const std::vector<float> scale = row_scale(valid, std::nullopt, students[0].size(0));
  double sum = 0;
  std::vector<Tensor> grads;
  for (int64_t k = 0; k < pairs; ++k) {
    const Tensor &student = students[k], &teacher = teachers[k];
    STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0) &&
                        student.size(1) == teacher.size(1) && student.size(1) > 0 &&
                        student.scalar_type() == teacher.scalar_type(),
                    "fastkd::mse takes pairs of (N, d) tensors of one shape and dtype, d at least 1");
    STD_TORCH_CHECK(!valid || student.size(0) == (int64_t)scale.size(),
                    "fastkd::mse: with valid all pairs must have the same rows");
    const Tensor grad = need_grad[k] ? new_gradient(student) : new_empty(student, {0});
    const float weight = weight_of.data()[k], count = count_of.data()[k];
    const double inverse = count == 0 ? 0.0 : 1.0 / count;
    // Half precision would flush a gradient divided by the count to zero: there the rest comes after, in Python.
    const double share = student.scalar_type() == ScalarType::Half ? 1.0 : weight * inverse;
    const double loss =
        pair_loss(student, teacher, scale.empty() ? nullptr : scale.data(), (float)(2.0 / student.size(1) * share),
                  need_grad[k] ? grad.mutable_data_ptr() : nullptr);
    ((float*)parts.mutable_data_ptr())[k] = (float)(inverse * loss);
    sum += weight * inverse * loss;
    grads.push_back(grad);
  }
  *(float*)total.mutable_data_ptr() = (float)sum;
  return {total, parts, grads};
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("mse", TORCH_BOX(&fastkd::mse)); }
