// What the kernel of one target reads and writes; see simd/attention_kl_div.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/heads.h"

namespace fastkd {

struct AttentionModel {
  Heads query, key;
  int64_t heads, key_heads, dim;
  float scale;
  const float* bias;  // added to the scaled scores, or null
  int64_t bias_batch, bias_head, bias_query;
};

struct AttentionKlDivTask {
  AttentionModel student, teacher;
  Heads grad_query, grad_key;
  bool need_grad;
  int64_t batch, queries, keys;
  const bool* query_mask;  // (batch, queries) or null: all count
  const bool* key_mask;    // (batch, keys) or null: all exist
  bool causal;
  int64_t window;       // of positions on either side, itself included; 0: no limit
  const float* weight;  // of a row in the gradient, (batch, heads, queries) by its strides
  int64_t weight_batch, weight_head, weight_query;
  float* loss;  // (batch, heads, queries)
  Dtype dtype;
};

// Query rows that are worked on at a time: as many as keep two score tiles in half of a common L2 cache of 1 MiB.
inline int64_t block_rows(const AttentionKlDivTask& task) {
  const int64_t fits = (1 << 17) / (2 * (task.keys + 48)) / 16 * 16;
  return std::min(std::max<int64_t>(fits, 16), std::min<int64_t>(128, (task.queries + 15) / 16 * 16));
}

// Floats that a thread's scratch memory must hold, whatever the target.
inline int64_t scratch_floats(const AttentionKlDivTask& task) {
  const auto width = [](int64_t n) { return (n + 31) / 32 * 32 + 16; };
  const int64_t student = width(task.student.dim), teacher = width(task.teacher.dim), keys = width(task.keys);
  const int64_t averaged = task.teacher.heads / task.student.heads, rows = width(block_rows(task));
  return keys * (4 * student + (1 + averaged) * teacher) + rows * (4 * student + teacher) + 3 * rows * keys + keys;
}

}  // namespace fastkd
