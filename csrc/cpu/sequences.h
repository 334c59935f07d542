// What the ops over ragged sequences have in common.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cpu/tensor.h"
#include "runtime/workers.h"

namespace fastkd {

class TorchThreads final : public runtime::Threads {
 public:
  int threads() const override { return (int)torch::stable::get_num_threads(); }
  void run(int64_t count, const std::function<void(int64_t)>& f) override {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }
};

inline const float* floats(const torch::stable::Tensor& tensor, const char* op, const char* name) {
  STD_TORCH_CHECK(dtype_of(tensor, op) == Dtype::float32, "fastkd::", op, ": ", name, " must be float32");
  return (const float*)tensor.data_ptr();
}

inline std::vector<int64_t> lengths_of(const torch::stable::Tensor& lengths, int64_t tokens, const char* op) {
  STD_TORCH_CHECK(lengths.dim() == 1 && lengths.scalar_type() == torch::headeronly::ScalarType::Long, "fastkd::", op,
                  ": lengths must be (sequences,) int64");
  const int64_t* n = (const int64_t*)lengths.data_ptr();
  const std::vector<int64_t> all(n, n + lengths.numel());
  int64_t left = tokens;
  for (const int64_t length : all) {
    STD_TORCH_CHECK(length >= 0 && length <= left, "fastkd::", op, ": lengths must add up to the tokens");
    left -= length;
  }
  STD_TORCH_CHECK(left == 0, "fastkd::", op, ": lengths must add up to the tokens");
  return all;
}

}  // namespace fastkd
