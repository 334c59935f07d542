// Rows of tensors: what their kernels take, and which of them count.
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

}  // namespace fastkd
