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

// So many values of that type, dense; null where there is no tensor of them.
template <class T>
class Values {
 public:
  Values(const std::optional<torch::stable::Tensor>& values, int64_t count, torch::headeronly::ScalarType type,
         const char* name) {
    using torch::headeronly::toString;
    if (!values) return;
    STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == count && values->scalar_type() == type, "fastkd: ", name,
                    " must hold ", count, " values of ", toString(type), " in one dimension, got ", values->numel(),
                    " of ", toString(values->scalar_type()));
    values_ = torch::stable::contiguous(*values);
  }
  const T* data() const { return values_ ? (const T*)values_->data_ptr() : nullptr; }

 private:
  std::optional<torch::stable::Tensor> values_;
};

// The weight of every row, 0 where it is not valid; empty: 1 for all.
inline std::vector<float> row_scale(const std::optional<torch::stable::Tensor>& valid,
                                    const std::optional<torch::stable::Tensor>& weights, int64_t rows) {
  if (!valid && !weights) return {};
  const Values<bool> counted(valid, rows, torch::headeronly::ScalarType::Bool, "valid");
  const Values<float> weight(weights, rows, torch::headeronly::ScalarType::Float, "weights");
  std::vector<float> scale(rows, 1.0f);
  for (int64_t i = 0; i < rows; ++i) {
    if (weights) scale[i] = weight.data()[i];
    if (valid && !counted.data()[i]) scale[i] = 0.0f;
  }
  return scale;
}

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
    if (!none_) unreduced_.reset(new float[rows]);
    STD_TORCH_CHECK(!denominator || (denominator->numel() == 1 && denominator->scalar_type() == kFloat),
                    "fastkd: denominator must be one float32");
    const double count = denominator ? *(const float*)denominator->data_ptr() : (double)rows;
    if (reduction == kMean) scale_ = count == 0 ? 0.0 : 1.0 / count;
  }

  float* data() const { return none_ ? (float*)loss_->mutable_data_ptr() : unreduced_.get(); }

  // What multiplies the rows' gradients. Half precision would flush one divided by the count to zero: there the
  // division comes after, in Python.
  double grad_scale(Dtype dtype) const { return dtype == Dtype::float16 ? 1.0 : scale_; }

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
