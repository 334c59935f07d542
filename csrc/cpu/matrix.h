// Matrices in memory that an op owns, and their products by the BLAS that torch brings.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace fastkd {

// Of an element that a product may have.
inline int64_t bytes_of(torch::headeronly::ScalarType type) {
  return type == torch::headeronly::ScalarType::Float ? 4 : 2;
}

struct Matrix {
  void* data;
  int64_t rows, columns, row_stride, column_stride;
  torch::headeronly::ScalarType type;

  static Matrix dense(void* data, int64_t rows, int64_t columns, torch::headeronly::ScalarType type) {
    return {data, rows, columns, columns, 1, type};
  }
  static Matrix of(const torch::stable::Tensor& t) {
    return {const_cast<void*>(t.data_ptr()), t.size(0), t.size(1), t.stride(0), t.stride(1), t.scalar_type()};
  }
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride, type}; }
  Matrix first(int64_t n) const { return {data, n, columns, row_stride, column_stride, type}; }
  torch::stable::Tensor tensor() const {
    return torch::stable::from_blob(data, {rows, columns}, {row_stride, column_stride},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), type);
  }
};

// out = a b. The kernel of torch itself, below autograd and autocast: it also runs inside a thread of parallel_for.
inline void multiply(const Matrix& a, const Matrix& b, const Matrix& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.tensor().get(), a.tensor().get(), b.tensor().get()));
}

// out += a b
inline void multiply_add(const Matrix& a, const Matrix& b, const Matrix& out) {
  const torch::stable::Tensor sum = out.tensor();
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(sum.get(), sum.get(), a.tensor().get(), b.tensor().get(), 1.0, 1.0));
}

}  // namespace fastkd
