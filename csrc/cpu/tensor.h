// What every op asks of its tensors before a kernel sees them as bare pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/dtype.h"

namespace fastkd {

inline Dtype dtype_of(const torch::stable::Tensor& tensor, const char* op) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(false, "fastkd::", op, " takes float32, bfloat16 or float16");
  }
}

// A matrix whose rows may have any stride.
inline torch::stable::Tensor dense_rows(const torch::stable::Tensor& t) {
  return t.stride(1) == 1 || t.size(1) == 1 ? t : torch::stable::contiguous(t);
}

}  // namespace fastkd
