// Where the numbers of an LSTM step lie (in a warp's registers, in shared memory, among the tokens), and one cell.
//
// A warp computes all four gates of eight units, for eight sequences at a time, so that a cell is one thread's own
// business. It multiplies two 16 x 16 blocks of weights, rows (gate, unit), with 16 x 8 of the hidden state:
//
//   rows 0..7 and 8..15 of the first block: gates i and f; of the second: g and o
//   lane l's sums: unit l / 4, sequences 2 (l % 4) and 2 (l % 4) + 1
//
// A sum over the depth may be taken in any order, as long as both factors take the same: lane l's pairs of two
// successive products are the octet l % 4 of 32 of the depth, hence one load of 16 bytes for each factor.
#pragma once

#include "cuda/ptx.h"

namespace fastkd::cuda {

constexpr int kUnits = 8, kSequences = 8, kGates = 4;
constexpr int kChunk = 32;    // of the depth: an octet for each of the lanes that share a unit
constexpr int kStages = 4;    // steps whose gates are under way or there
constexpr int kProducts = 2;  // blocks of 16 x 16 side by side in a chunk

// kParts warps share the depth of eight units, kChunks for each. A thread block has kTiles times eight sequences.
template <class Element_, int kChunks_, int kParts_, int kTiles_>
struct Shape {
  using Element = Element_;
  static constexpr int kChunks = kChunks_, kParts = kParts_, kTiles = kTiles_;
  static constexpr int kBlocks = kParts == 4 ? 2 : 4;  // of eight units
  static constexpr int kWarps = kBlocks * kParts, kThreads = 32 * kWarps;
  static constexpr int kBlockUnits = kBlocks * kUnits;
  static constexpr int kDepth = kParts * kChunks * kChunk;  // the hidden size, filled up with zeros
  static constexpr int kRows = kTiles * kSequences;
  static constexpr int kOwn = (kTiles + kParts - 1) / kParts;  // tiles whose cells one warp has at most
};

struct Sequence {
  int32_t begin, length;  // of its tokens

  __device__ int token(int step, bool backward) const { return begin + (backward ? length - 1 - step : step); }
};

// Rows of the hidden state are not padded, but each eight of their octets are permuted. Then neither the octets l % 4
// of two neighbouring rows share a bank, which are read at once, nor the same octet of eight rows, written at once.
template <class S>
__device__ inline int octet_at(int row, int eight, int octet) {
  return row * (S::kDepth / 8) + eight * 8 + (octet ^ ((row & 1) << 2 | (row >> 1 & 3)));
}

// One warp's weights: [chunk][product][gates i and f, then g and o][register].
template <class S>
struct Weights {
  uint32_t a[S::kChunks][kProducts][2][4];

  // From `unit` on and from `depth` on, of a direction's (4 hidden, hidden). In pairs: of wider loads the compiler
  // would reorder the registers in every step.
  __device__ __forceinline__ void load(const uint16_t* weight, int hidden, int unit, int depth, int lane) {
    const uint16_t* row = weight + (int64_t)(unit + lane / 4) * hidden + depth + lane % 4 * 8;
#pragma unroll
    for (int chunk = 0; chunk < S::kChunks; ++chunk) {
      const bool real = unit < hidden && depth + chunk * kChunk + lane % 4 * 8 < hidden;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint16_t* pair = row + (int64_t)gate * hidden * hidden + chunk * kChunk + 2 * i;
          a[chunk][i / 2][gate / 2][gate % 2 + i % 2 * 2] = real ? *reinterpret_cast<const uint32_t*>(pair) : 0;
        }
    }
  }
};

struct alignas(16) Quad {
  float v[4];
};

// A thread's sums of one tile: of gates i and f, then of g and o, each for two sequences.
struct Sums {
  Quad pair[2];

  __device__ __forceinline__ float of(int gate, int sequence) const {
    return pair[gate / 2].v[gate % 2 * 2 + sequence];
  }

  __device__ __forceinline__ void add(const Quad& addend, int half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[half].v[i] += addend.v[i];
  }
};

// `hidden` lies as octet_at says; the warp's part of the depth begins at `depth`. Each sum is of two halves, so that
// four products are under way.
template <class S>
__device__ __forceinline__ Sums multiply(const Weights<S>& weights, const Octet* hidden, int tile, int depth,
                                         int lane) {
  Sums sums[kProducts] = {};
#pragma unroll
  for (int chunk = 0; chunk < S::kChunks; ++chunk) {
    const int row = tile * kSequences + lane / 4, octet = chunk % 2 * 4 + lane % 4;
    const Octet b = hidden[octet_at<S>(row, depth / 64 + chunk / 2, octet)];
#pragma unroll
    for (int product = 0; product < kProducts; ++product)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        S::Element::multiply(sums[product].pair[half].v, weights.a[chunk][product][half], b.pair[2 * product],
                             b.pair[2 * product + 1]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) sums[0].add(sums[1].pair[half], half);
  return sums[0];
}

// e^(factor x), kept where a product of two of them is still a number.
__device__ __forceinline__ float power(float factor, float x) {
  constexpr float kLog2e = 1.44269504f;
  return exp2_approx(fmaxf(-60.0f, fminf(60.0f, x * (factor * kLog2e))));
}

// New hidden state of a unit from its gates i, f, g, o before their non-linearities. Error below 2e-6.
__device__ __forceinline__ float update(const float (&gates)[kGates], float& cell) {
  const float input = power(-1, gates[0]), forget = power(-1, gates[1]), fresh = power(-2, gates[2]),
              output = power(-1, gates[3]);
  cell = cell * reciprocal_approx(1 + forget) + (1 - fresh) * reciprocal_approx((1 + input) * (1 + fresh));
  const float squashed = power(-2, cell);
  return (1 - squashed) * reciprocal_approx((1 + output) * (1 + squashed));
}

}  // namespace fastkd::cuda
