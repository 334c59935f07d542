// What the kernel of one target reads and writes; see simd/attention.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/heads.h"

namespace fastkd {

struct AttentionTask {
  Heads query, key, value;
  Heads output;                                         // of the forward pass alone
  Heads grad_output, grad_query, grad_key, grad_value;  // of the gradient alone
  int64_t batch, heads, key_heads, queries, keys, dim;
  float scale;
  bool causal;       // query i sees keys 0..i
  const bool* mask;  // of the keys that a query sees, by its strides, or null
  int64_t mask_batch, mask_head, mask_query;
  float* lse;  // (batch, heads, queries): logarithms of the sums of exponentials, +inf of a query that sees nothing
  Dtype dtype;
};

constexpr int64_t kMostRows = 128;

// Query rows that are worked on at a time: as many as keep three tiles of scores in half of a common L2 cache of 1 MiB.
inline int64_t block_rows(const AttentionTask& task) {
  const int64_t fits = (1 << 17) / (3 * (task.keys + 48)) / 16 * 16;
  return std::min(std::max<int64_t>(fits, 16), std::min(kMostRows, (task.queries + 15) / 16 * 16));
}

// Floats that a thread's scratch memory must hold, whatever the target.
inline int64_t scratch_floats(const AttentionTask& task) {
  const auto width = [](int64_t n) { return (n + 31) / 32 * 32 + 16; };
  const int64_t dim = width(task.dim), keys = width(task.keys), rows = width(block_rows(task));
  return 7 * keys * dim + 5 * rows * dim + 3 * rows * keys;
}

}  // namespace fastkd
