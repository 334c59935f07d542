// What the kernels of one target read and write; see simd/lstm_steps.h.
#pragma once

#include "cpu/dtype.h"
#include "runtime/panels.h"

namespace fastkd {

// One direction of a layer over sequences that come longest first. Pointers are at the direction's own columns of rows
// by token: (tokens, directions, 4 hidden) of gates, (tokens, directions, hidden) of the others.
struct LstmSteps {
  const runtime::Panels* weight;  // pack_linear of (4 hidden, hidden), or of its transpose for the gradient
  const int64_t *begin, *length;  // first token and number of tokens of each sequence
  int64_t sequences, hidden, directions;
  bool backward;  // each sequence from its end
  Dtype dtype;    // of gates, activations and grad_gates; the others are float

  int64_t gates_stride() const { return directions * 4 * hidden; }
  int64_t stride() const { return directions * hidden; }
  int64_t token(int64_t sequence, int64_t step) const {
    return begin[sequence] + (backward ? length[sequence] - 1 - step : step);
  }
  int64_t count() const { return sequences > 0 ? length[0] : 0; }
  int64_t running(int64_t step) const {
    int64_t n = 0;
    while (n < sequences && length[n] > step) ++n;
    return n;
  }
};

struct LstmForward : LstmSteps {
  const void* gates;  // the input's part
  void* activations;
  float *cells, *states;
};

struct LstmBackward : LstmSteps {
  const void* activations;
  const float *cells, *grad;
  void* grad_gates;
};

}  // namespace fastkd
