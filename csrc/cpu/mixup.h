// What the kernel of one target reads and writes; see simd/mixup.h.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace fastkd {

struct MixupTask {
  const void* x;  // (rows, columns), rows stride elements apart
  void* out;      // (rows, columns) contiguous
  int64_t rows, columns, stride;
  int64_t chunk;                         // columns taken at a time
  const int64_t *order, *partner;        // (rows)
  const float *weight, *partner_weight;  // (rows)
  Dtype dtype;
};

}  // namespace fastkd
