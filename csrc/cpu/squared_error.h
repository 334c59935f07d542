// What the kernels of one target read and write; see simd/squared_error.h.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace fastkd {

// Row i of a task is row index[i] of target, scale, loss, addend and output, or row i without an index.
struct SquaredErrorTask {
  const void* prediction;  // (rows, columns), rows prediction_stride elements apart
  const float* bias;       // (columns) added to the prediction, or null
  const void* target;      // (..., columns) of dtype, rows target_stride elements apart
  const float* scale;      // one per row: weight of the row, 0 where it does not count; null: 1
  float factor;            // of the gradient, beside scale
  const void* addend;      // (..., columns) of dtype, contiguous, added to the gradient, or null
  void* grad;              // (rows, columns) contiguous: factor * scale * error + addend, or null; may be prediction
  void* output;            // (..., columns) of dtype, contiguous: prediction + bias, or null
  float* loss;             // one per row: scale * sum of squares / columns, or null
  float* column_sums;      // (columns) of the gradient, added to, or null
  const int64_t* index;
  int64_t columns, prediction_stride, target_stride;
  Dtype dtype;             // of target, addend and output
  Dtype prediction_dtype;  // float32 or dtype
  Dtype grad_dtype;        // float32 or dtype
};

// to[i, :] = from[index[i], :] (gather) or to[index[i], :] = from[i, :] (scatter), converted.
struct MoveRowsTask {
  const void* from;
  void* to;
  const int64_t* index;  // null: i
  int64_t rows, columns, from_stride, to_stride;
  Dtype from_dtype, to_dtype;  // one of them float32, or both the same
};

// to[i] = sum of from[k * count + i] over k, in that order, converted.
struct SumTask {
  const void* from;
  void* to;
  int64_t terms, count;
  Dtype from_dtype, to_dtype;  // one of them float32, or both the same
};

void squared_error(const SquaredErrorTask&, int64_t begin, int64_t end);
void gather_rows(const MoveRowsTask&);
void scatter_rows(const MoveRowsTask&);
void sum_terms(const SumTask&, int64_t begin, int64_t end);
void add_bfloat16(float* sums, const void* terms, int64_t count);  // sums += terms

}  // namespace fastkd
