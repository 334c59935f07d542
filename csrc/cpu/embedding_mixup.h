// What the kernels of one target read and write; see simd/embedding_mixup.h.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace fastkd {

struct EmbeddingMixupTask {
  const int64_t* ids;  // (rows, tokens) contiguous
  const void* table;   // (vocabulary, columns), rows stride elements apart
  void* out;           // (rows, tokens, columns) contiguous
  int64_t tokens, columns, stride;
  const int64_t *order, *partner;        // (rows)
  const float *weight, *partner_weight;  // (rows)
  Dtype dtype;
};

// One token's share in the gradient of its row of the table: rows of the incoming gradient and their weights.
struct Source {
  int64_t row, partner;
  float weight, partner_weight;
};

struct EmbeddingGradTask {
  const void* grad;  // (rows * tokens, columns) contiguous
  void* out;         // (vocabulary, columns) contiguous
  int64_t columns;
  const int64_t* first;   // (vocabulary + 1): where the sources of a row of the table begin
  const Source* sources;  // in the order of the table's rows, and one more that is only looked ahead to
  Dtype dtype;
};

}  // namespace fastkd
