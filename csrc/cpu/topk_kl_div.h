// What the kernel of one target reads and writes; see simd/topk_kl_div.h.
#pragma once

#include <cstdint>

#include "cpu/kl_div.h"

namespace fastkd {

struct TopkKlDivTask {
  const void* student;   // (rows, vocabulary), rows student_stride elements apart
  const int64_t* ids;    // (rows, k) ascending; -1 lists nothing
  const float* teacher;  // (rows, outcomes), -inf where nothing is listed
  void* grad;            // (rows, vocabulary) contiguous, or null
  float* loss;           // (rows)
  int64_t rows, vocabulary, k, student_stride;
  int64_t outcomes;              // k, or k + 1: then the rest of the vocabulary is one, the last
  const float* row_temperature;  // (rows) or null: then temperature
  const bool* valid;             // (rows) or null: all
  const float* row_weight;       // (rows) or null: 1
  float temperature, beta, grad_scale;
  bool scale_by_temperature;
  Dtype dtype;
  Divergence divergence;
};

// Columns whose exponentials share a running maximum.
constexpr int64_t kRestColumns = 512;

// Floats of scratch memory: exponentials of a row, the maxima of its blocks, and two rows of outcomes with their
// gradient.
inline int64_t rest_floats(int64_t vocabulary) { return vocabulary + 16 + (vocabulary / kRestColumns + 1) * 16; }
inline int64_t outcome_floats(int64_t outcomes) { return (outcomes + 15) / 16 * 16; }
inline int64_t scratch_floats(int64_t vocabulary, int64_t outcomes) {
  return (rest_floats(vocabulary) + 15) / 16 * 16 + 3 * outcome_floats(outcomes) + scratch_floats(outcomes);
}

}  // namespace fastkd
