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

}  // namespace fastkd
