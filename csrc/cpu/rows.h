// Rows of tensors: what their kernels take, which of them count, and how their losses are summed.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "cpu/dtype.h"
#include "runtime/huge_pages.h"

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

// One value of that type per row, dense; null where there is none.
template <class T>
class PerRow {
 public:
  PerRow(const std::optional<torch::stable::Tensor>& values, int64_t rows, torch::headeronly::ScalarType type,
         const char* name) {
    if (!values) return;
    STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == rows && values->scalar_type() == type, "fastkd: ", name,
                    " must hold one value per row");
    values_ = torch::stable::contiguous(*values);
  }
  const T* data() const { return values_ ? (const T*)values_->data_ptr() : nullptr; }

 private:
  std::optional<torch::stable::Tensor> values_;
};

// Fresh memory for a gradient of (rows, columns).
inline torch::stable::Tensor new_gradient(const torch::stable::Tensor& like) {
  const torch::stable::Tensor grad = torch::stable::new_empty(like, {like.size(0), like.size(1)});
  prefer_huge_pages(grad.mutable_data_ptr(), grad.numel() * grad.element_size());
  return grad;
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

// The losses of rows, and what becomes of them.
class RowLosses {
 public:
  RowLosses(const torch::stable::Tensor& like, int64_t rows, int64_t reduction,
            const std::optional<torch::stable::Tensor>& denominator)
      : rows_(rows), none_(reduction == kNone) {
    constexpr auto kFloat = torch::headeronly::ScalarType::Float;
    loss_ = none_ ? torch::stable::new_empty(like, {rows}, kFloat) : torch::stable::new_empty(like, {}, kFloat);
    if (!none_) unreduced_ = std::make_unique_for_overwrite<float[]>(rows);
    const double count = denominator ? *(const float*)denominator->data_ptr() : (double)rows;
    if (reduction == kMean) scale_ = count == 0 ? 0.0 : 1.0 / count;
  }

  float* data() const { return none_ ? (float*)loss_->mutable_data_ptr() : unreduced_.get(); }

  // What multiplies the rows' gradients. Half precision would flush one divided by the count to zero: there the
  // division comes after, in Python.
  float grad_scale(Dtype dtype) const { return dtype == Dtype::float16 ? 1.0f : (float)scale_; }

  torch::stable::Tensor reduced() const {
    if (!none_) *(float*)loss_->mutable_data_ptr() = (float)(scale_ * sum(unreduced_.get(), rows_));
    return *loss_;
  }

 private:
  int64_t rows_;
  bool none_;
  double scale_ = 1.0;
  std::optional<torch::stable::Tensor> loss_;
  std::unique_ptr<float[]> unreduced_;
};

}  // namespace fastkd
