// LSTM layers over ragged batches: what is known of a layer, and how it runs.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/panels.h"
#include "runtime/workers.h"

namespace fastkd::runtime {

struct Direction {
  Panels input, recurrent;  // columns are gates, see pack_gates
  int64_t hidden = 0;
  bool backward = false;
};

// Weights (4 hidden, inputs) and (4 hidden, hidden) and the sum of both biases (4 hidden) as torch.nn.LSTM has them:
// gates i, f, g, o.
Direction make_direction(const Matrix& input, const Matrix& recurrent, const float* bias, Precision precision,
                         bool backward);

// A row per token: of `values`, or of a table by its ids. A table of bytes has a scale per row and 128 for zero, as
// quantize (simd/panels.h) makes them.
struct Inputs {
  const float* values = nullptr;
  const uint8_t* bytes = nullptr;
  const float* scale = nullptr;
  const int32_t* ids = nullptr;  // null: the token's own number
  int64_t stride = 0;            // elements from row to row

  int64_t row(int64_t token) const { return ids ? ids[token] : token; }
};

// One direction over sequences that come longest first; see simd/lstm.h.
struct LstmTask {
  const Direction* layer;
  Inputs x;
  const int64_t *begin, *length;  // first token and number of tokens of each sequence
  int64_t sequences;
  float* y;  // (tokens, hidden), rows y_stride apart
  int64_t y_stride;
};

// The first token and the number of tokens of some sequences, longest first.
struct Sequences {
  const int64_t *begin, *length;
  int64_t count;
};

// f(direction, sequences) for groups of all sequences, given by their lengths, over the threads.
void each_group(int64_t directions, const std::vector<int64_t>& lengths, Threads& threads,
                const std::function<void(int64_t, const Sequences&)>& f);

// All directions over all sequences, given by their lengths; each writes its hidden states, (tokens, hidden), beside
// the one before it in y. Results do not depend on the order, the company or the number of threads.
void run_lstm(const std::vector<const Direction*>& directions, const Inputs& x, const std::vector<int64_t>& lengths,
              float* y, int64_t y_stride, Threads& threads);

}  // namespace fastkd::runtime
