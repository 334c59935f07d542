// What the kernel of one target reads and writes; see simd/kl_div.h.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace fastkd {

enum class Divergence { forward, reverse, jsd };

struct KlDivTask {
  const void* student;  // (rows, vocabulary), rows student_stride elements apart
  const void* teacher;
  void* grad;    // (rows, vocabulary) contiguous, or null
  float* loss;   // (rows)
  float* stats;  // (4, rows) or null
  int64_t rows, vocabulary, student_stride, teacher_stride;
  const float* row_temperature;  // (rows) or null: then temperature
  const bool* valid;             // (rows) or null: all
  const int64_t* labels;         // (rows) or null
  float temperature, beta, cross_entropy_weight, grad_scale;
  bool scale_by_temperature;
  Dtype dtype;
  Divergence divergence;
};

// Rows of at most so many columns are worked on in groups of as many as a vector has lanes; the shortest side by side.
constexpr int64_t kGroupColumns = 512, kShortColumns = 24;

// Floats that a thread's scratch memory must hold: two per column of a row or of 16 grouped ones, and two vectors per
// block of at least 128 columns.
inline int64_t scratch_floats(int64_t vocabulary) {
  const int64_t columns = vocabulary + 16;
  return vocabulary <= kGroupColumns ? 2 * 16 * columns : 2 * columns + columns / 128 * 32 + 32;
}

}  // namespace fastkd
