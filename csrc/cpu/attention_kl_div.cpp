// torch.ops.fastkd.attention_kl_div on the CPU: key heads in parallel, each by the kernel of the best instruction set.
#include "cpu/attention_kl_div.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/scratch.h"
#include "cpu/tensor.h"
#include "simd/dispatch.h"

#define FASTKD_SOURCE "simd/attention_kl_div.h"
#include "simd/foreach_target.h"

namespace fastkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Heads heads_of(const Tensor& x, void* data) { return {data, x.stride(0), x.stride(1), x.stride(2)}; }

AttentionModel model_of(const char* name, const Tensor& query, const Tensor& key, const std::optional<Tensor>& bias,
                        double scale) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && query.scalar_type() == key.scalar_type() &&
                      query.size(0) == key.size(0) && query.size(3) == key.size(3) && key.size(1) > 0 &&
                      query.size(1) % key.size(1) == 0,
                  "fastkd::attention_kl_div: ", name, " query and key must be (B, H, T, d) of one B, d and dtype");
  for (const Tensor* x : {&query, &key})
    STD_TORCH_CHECK(x->stride(3) == 1 || x->size(3) == 1, "fastkd::attention_kl_div: the last dimension must be dense");
  AttentionModel model{};
  model.query = heads_of(query, query.data_ptr());
  model.key = heads_of(key, key.data_ptr());
  model.heads = query.size(1);
  model.key_heads = key.size(1);
  model.dim = query.size(3);
  model.scale = (float)scale;
  if (!bias) return model;
  STD_TORCH_CHECK(bias->dim() == 4 && bias->scalar_type() == ScalarType::Float && bias->size(0) == query.size(0) &&
                      bias->size(1) == query.size(1) && bias->size(2) == query.size(2) &&
                      bias->size(3) == key.size(2) && (bias->stride(3) == 1 || bias->size(3) == 1),
                  "fastkd::attention_kl_div: ", name, " bias must be float32 (B, H, T_q, T_k), its rows dense");
  model.bias = (const float*)bias->data_ptr();
  model.bias_batch = bias->stride(0);
  model.bias_head = bias->stride(1);
  model.bias_query = bias->stride(2);
  return model;
}

std::optional<Tensor> checked_mask(const std::optional<Tensor>& mask, int64_t batch, int64_t tokens) {
  if (!mask) return mask;
  STD_TORCH_CHECK(
      mask->dim() == 2 && mask->size(0) == batch && mask->size(1) == tokens && mask->scalar_type() == ScalarType::Bool,
      "fastkd::attention_kl_div: a mask must be bool, one value per token");
  return torch::stable::contiguous(*mask);
}

void run(const AttentionKlDivTask& task) {
  const auto kernel = FASTKD_PICK(attention_kl_div);
  torch::stable::parallel_for(0, task.batch * task.student.key_heads, 1, [&](int64_t begin, int64_t end) {
    kernel(task, begin, end, scratch(scratch_floats(task)));
  });
}

std::tuple<Tensor, Tensor, Tensor> attention_kl_div(
    const Tensor& student_query, const Tensor& student_key, const Tensor& teacher_query, const Tensor& teacher_key,
    std::optional<Tensor> student_bias, std::optional<Tensor> teacher_bias,
    std::optional<Tensor> /*student_lse: its scores are at hand*/, std::optional<Tensor> /*teacher_lse*/,
    std::optional<Tensor> query_mask, std::optional<Tensor> key_mask, double student_scale, double teacher_scale,
    bool causal, int64_t window, std::optional<Tensor> row_weight) {
  using namespace torch::stable;
  AttentionKlDivTask task{};
  task.student = model_of("student", student_query, student_key, student_bias, student_scale);
  task.teacher = model_of("teacher", teacher_query, teacher_key, teacher_bias, teacher_scale);
  task.batch = student_query.size(0);
  task.queries = student_query.size(2);
  task.keys = student_key.size(2);
  STD_TORCH_CHECK(teacher_query.size(0) == task.batch && teacher_query.size(2) == task.queries &&
                      teacher_key.size(2) == task.keys && task.student.heads > 0 &&
                      task.teacher.heads % task.student.heads == 0 &&
                      teacher_query.scalar_type() == student_query.scalar_type(),
                  "fastkd::attention_kl_div: student and teacher must agree in batch, tokens and dtype, and the "
                  "teacher's heads be a multiple of the student's");
  query_mask = checked_mask(query_mask, task.batch, task.queries);
  key_mask = checked_mask(key_mask, task.batch, task.keys);
  task.query_mask = query_mask ? (const bool*)query_mask->data_ptr() : nullptr;
  task.key_mask = key_mask ? (const bool*)key_mask->data_ptr() : nullptr;
  task.causal = causal;
  task.window = window;
  task.dtype = dtype_of(student_query, "attention_kl_div");

  Tensor loss = new_empty(student_query, {task.batch, task.student.heads, task.queries}, ScalarType::Float);
  task.loss = (float*)loss.mutable_data_ptr();
  task.need_grad = row_weight.has_value();
  Tensor grad_query = task.need_grad ? empty_like(student_query) : new_empty(student_query, {0});
  Tensor grad_key = task.need_grad ? empty_like(student_key) : new_empty(student_key, {0});
  if (task.need_grad) {
    STD_TORCH_CHECK(row_weight->dim() == 3 && row_weight->size(0) == task.batch &&
                        row_weight->size(1) == task.student.heads && row_weight->size(2) == task.queries &&
                        row_weight->scalar_type() == ScalarType::Float,
                    "fastkd::attention_kl_div: row_weight must be float32 (B, H, T_q)");
    task.grad_query = heads_of(grad_query, grad_query.mutable_data_ptr());
    task.grad_key = heads_of(grad_key, grad_key.mutable_data_ptr());
    task.weight = (const float*)row_weight->data_ptr();
    task.weight_batch = row_weight->stride(0);
    task.weight_head = row_weight->stride(1);
    task.weight_query = row_weight->stride(2);
  }
  run(task);
  return {loss, grad_query, grad_key};
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("attention_kl_div", TORCH_BOX(&fastkd::attention_kl_div)); }
