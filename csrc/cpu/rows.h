// Rows of tensors: what their kernels take, which of them count, and how their losses are summed.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace fastkd {

inline torch::stable::Tensor dense_rows(const torch::stable::Tensor& t) {
  return t.stride(1) == 1 || t.size(1) == 1 ? t : torch::stable::contiguous(t);
}

// The weight of every row, 0 where it is not valid; empty: 1 for all.
inline std::vector<float> row_scale(const std::optional<torch::stable::Tensor>& valid,
                                    const std::optional<torch::stable::Tensor>& weights, int64_t rows) {
  if (!valid && !weights) return {};
  std::vector<float> scale(rows, 1.0f);
  for (const auto& values : {valid, weights})
    STD_TORCH_CHECK(!values || values->numel() == rows, "fastkd: valid and weights must hold one value per row");
  for (int64_t i = 0; weights && i < rows; ++i) scale[i] = ((const float*)weights->data_ptr())[i];
  for (int64_t i = 0; valid && i < rows; ++i)
    if (!((const bool*)valid->data_ptr())[i]) scale[i] = 0.0f;
  return scale;
}

enum Reduction { kNone, kSum, kMean };

// Sum in double and in a fixed order, so that it does not depend on the number of threads.
inline float sum(const float* values, int64_t n) {
  constexpr int kSums = 8;
  double totals[kSums] = {}, total = 0;
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int k = 0; k < kSums; ++k) totals[k] += values[i + k];
  for (; i < n; ++i) total += values[i];
  for (const double t : totals) total += t;
  return (float)total;
}

}  // namespace fastkd
