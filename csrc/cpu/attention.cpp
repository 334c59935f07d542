// Attention of models in training on the CPU, and its gradient: key heads in parallel.
#include "cpu/attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/scratch.h"
#include "cpu/tensor.h"
#include "simd/dispatch.h"

#define FASTKD_SOURCE "simd/attention.h"
#include "simd/foreach_target.h"

namespace fastkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// (batch, heads, tokens, dim) of any strides whose last dimension is dense.
Heads heads_of(const Tensor& x, const char* op) {
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) == 1, "fastkd::", op, ": the last dimension must be dense");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// (batch, tokens, heads, dim), which is how models go on with it.
Heads tokens_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(2), x.stride(1)}; }

Tensor tokens_like(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(1), x.size(3)});
}

AttentionTask task_of(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                      double scale, bool causal, const char* op) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4 && key.size(1) > 0 && key.size(2) > 0 &&
                      query.size(0) == key.size(0) && query.size(1) % key.size(1) == 0 && query.size(3) == key.size(3),
                  "fastkd::", op, ": query and key must be (B, H, T, d) of one B and d, and a key at least");
  for (int64_t dimension = 0; dimension < 4; ++dimension)
    STD_TORCH_CHECK(value.size(dimension) == key.size(dimension), "fastkd::", op, ": value must be shaped as key");
  STD_TORCH_CHECK(query.scalar_type() == key.scalar_type() && query.scalar_type() == value.scalar_type(),
                  "fastkd::", op, ": query, key and value must be of one dtype");
  AttentionTask task{};
  task.query = heads_of(query, op), task.key = heads_of(key, op), task.value = heads_of(value, op);
  task.batch = query.size(0), task.heads = query.size(1), task.key_heads = key.size(1);
  task.queries = query.size(2), task.keys = key.size(2), task.dim = query.size(3);
  task.scale = (float)scale;
  task.causal = causal;
  STD_TORCH_CHECK(!causal || task.queries == task.keys, "fastkd::", op, ": causal needs as many queries as keys");
  task.dtype = dtype_of(query, op);
  if (!mask) return task;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 4 && mask->size(0) == task.batch &&
                      mask->size(1) == task.heads && mask->size(2) == task.queries && mask->size(3) == task.keys &&
                      (mask->stride(3) == 1 || task.keys == 1),
                  "fastkd::", op, ": mask must be bool (B, H, T_q, T_k), its rows dense");
  task.mask = (const bool*)mask->data_ptr();
  task.mask_batch = mask->stride(0), task.mask_head = mask->stride(1), task.mask_query = mask->stride(2);
  return task;
}

void run(const AttentionTask& task, bool backward) {
  const auto kernel = FASTKD_PICK(attention);
  torch::stable::parallel_for(0, task.batch * task.key_heads, 1, [&](int64_t begin, int64_t end) {
    kernel(task, backward, begin, end, scratch(scratch_floats(task)));
  });
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                             std::optional<Tensor> mask, double scale, bool causal) {
  AttentionTask task = task_of(query, key, value, mask, scale, causal, "attention_forward");
  const Tensor output = tokens_like(query);
  const Tensor lse = torch::stable::new_empty(query, {task.batch, task.heads, task.queries}, ScalarType::Float);
  task.output = tokens_of(output);
  task.lse = (float*)lse.mutable_data_ptr();
  run(task, false);
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_in, const Tensor& query, const Tensor& key,
                                                      const Tensor& value, std::optional<Tensor> mask, double scale,
                                                      bool causal, const Tensor& lse) {
  AttentionTask task = task_of(query, key, value, mask, scale, causal, "attention_backward");
  const Tensor grad = torch::stable::contiguous(grad_in);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == task.batch && grad.size(1) == task.queries &&
                      grad.size(2) == task.heads && grad.size(3) == task.dim &&
                      grad.scalar_type() == query.scalar_type(),
                  "fastkd::attention_backward: grad must be (B, T_q, H, d) of query's dtype");
  STD_TORCH_CHECK(lse.numel() == task.batch * task.heads * task.queries && lse.is_contiguous() &&
                      lse.scalar_type() == ScalarType::Float,
                  "fastkd::attention_backward: lse must be float32 (B, H, T_q), dense");
  const Tensor of_query = tokens_like(query), of_key = tokens_like(key), of_value = tokens_like(value);
  task.grad_output = tokens_of(grad);
  task.grad_query = tokens_of(of_query), task.grad_key = tokens_of(of_key), task.grad_value = tokens_of(of_value);
  task.lse = (float*)lse.data_ptr();
  run(task, true);
  const auto heads_first = [](const Tensor& x) { return torch::stable::transpose(x, 1, 2); };
  return {heads_first(of_query), heads_first(of_key), heads_first(of_value)};
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastkd::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&fastkd::attention_backward));
}
