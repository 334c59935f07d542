// All steps of an LSTM layer in one launch.
//
// A group of thread blocks takes one (direction, tile of sequences) after another. Each block has the recurrent weights
// of its units in registers from the first step to the last; what changes hands in a step is the hidden state alone.
// Sequences come longest first, a tile ends with its longest, and a sequence that is over writes nothing.
#pragma once

#include "cuda/exchange.h"

namespace fastkd::cuda {

template <class S, class Exchange>
class Recurrence {
  using Memory = Shared<S, Exchange::kBuffers>;

  const LstmTask& task;
  Memory& shared;
  Place<S> at;
  const int depth = at.part * S::kChunks * kChunk;  // the first of the warp's
  Exchange exchange;
  Weights<S> weights;
  float cell[S::kOwn][2];  // of sequences 2 (lane % 4) and the next of each own tile

 public:
  __device__ __forceinline__ Recurrence(const LstmTask& task)
      : task(task), shared(*reinterpret_cast<Memory*>(shared_memory())), at(task) {}

  __device__ __forceinline__ void run() {
    // What lies beyond the hidden size meets zero weights, but must be a number.
    for (auto& buffer : shared.hidden)
      for (int i = threadIdx.x; i < S::kRows * S::kDepth / 8; i += S::kThreads) buffer[i] = Octet{};
    exchange.begin(shared);
    const int tiles = (task.count + S::kRows - 1) / S::kRows;
    int loaded = -1;
    for (int item = at.group; item < tiles * task.directions; item += task.groups) {
      at.direction = item / tiles;
      if (at.direction != loaded)
        weights.load(task.weight + at.direction * kGates * task.hidden * task.hidden, task.hidden, at.unit, depth,
                     at.lane);
      loaded = at.direction;
      run_tile(item % tiles * S::kRows);
    }
  }

 private:
  __device__ __forceinline__ void run_tile(int first) {
    const int steps = read_sequences(first);
#pragma unroll
    for (int own = 0; own < S::kOwn; ++own) cell[own][0] = cell[own][1] = 0;
    for (int step = 0; step < kStages - 1; ++step) fetch_gates(step);
    for (int step = 0; step < steps; ++step) {
      fetch_gates(step + kStages - 1);
      const Octet* hidden = step > 0 ? exchange.receive(shared, task, at, step) : nullptr;
      if (S::kParts > 1 && step > 0) leave_parts(hidden);
      wait_for_copies<kStages - 1>();
      __syncwarp();
      Octet states[S::kOwn];
#pragma unroll
      for (int own = 0; own < S::kOwn; ++own)
        if (at.has(own, task.hidden)) states[own] = advance(step > 0 ? sums(hidden, own) : Sums{}, own, step);
      exchange.send(shared, task, at, states, [&] { write(states, step); });
    }
    wait_for_copies<0>();  // of steps past the end, which must not come after the next tile's
    if (steps > 0) exchange.end(shared, task, at);
  }

  // Returns the length of the longest.
  __device__ __forceinline__ int read_sequences(int first) {
    __syncthreads();  // the tile before has done with them
    const int row = threadIdx.x;
    if (row < S::kRows) shared.sequences[row] = first + row < task.count ? task.sequences[first + row] : Sequence{0, 0};
    __syncthreads();
    int longest = 0;
    for (const Sequence& sequence : shared.sequences) longest = sequence.length > longest ? sequence.length : longest;
    return longest;
  }

  __device__ __forceinline__ Octet* gates_of(int step, int own) { return shared.gates[at.warp][step % kStages][own]; }

  // Lane l brings the eight units of gate l / 8 of sequence l % 8. Steps past the end count too, as empty groups.
  __device__ __forceinline__ void fetch_gates(int step) {
#pragma unroll
    for (int own = 0; own < S::kOwn; ++own)
      if (at.has(own, task.hidden)) {
        const Sequence sequence = shared.sequences[at.tile(own) * kSequences + at.lane % 8];
        const bool valid = step < sequence.length;
        const int64_t row = task.row(sequence, step, at.direction);
        const uint16_t* from = task.gates + (row * kGates + at.lane / 8) * task.hidden + at.unit;
        copy_async(gates_of(step, own) + at.lane, from, valid);
      }
    commit_copies();
  }

  // Warps that share units leave their sums; whoever finishes a tile adds them up, in one order for all tiles.
  __device__ __forceinline__ void leave_parts(const Octet* hidden) {
#pragma unroll
    for (int tile = 0; tile < S::kTiles; ++tile) {
      const Sums sums = multiply<S>(weights, hidden, tile, depth, at.lane);
      for (int half = 0; half < 2; ++half) shared.partial[at.warp][tile][half][at.lane] = sums.pair[half];
    }
    __syncthreads();
  }

  __device__ __forceinline__ Sums sums(const Octet* hidden, int own) {
    if constexpr (S::kParts == 1) return multiply<S>(weights, hidden, own, depth, at.lane);
    Sums total{};
#pragma unroll
    for (int part = 0; part < S::kParts; ++part)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        total.add(shared.partial[part * S::kBlocks + at.block][at.tile(own)][half][at.lane], half);
    return total;
  }

  // The new state of the warp's eight units, of sequence lane / 4 of the tile.
  __device__ __forceinline__ Octet advance(const Sums& sums, int own, int step) {
    using Element = typename S::Element;
    const Octet given = load_transposed(gates_of(step, own) + at.lane);
    auto& fresh = shared.fresh[at.warp][own];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float gates[kGates];
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const uint32_t pair = given.pair[gate];
        gates[gate] = sums.of(gate, i) + (i == 0 ? Element::low(pair) : Element::high(pair));
      }
      fresh[at.lane % 4 * 2 + i].unit[at.lane / 4] = Element::round(update(gates, cell[own][i]));
    }
    __syncwarp();
    return fresh[at.lane / 4].all;
  }

  __device__ __forceinline__ void write(const Octet (&states)[S::kOwn], int step) {
#pragma unroll
    for (int own = 0; own < S::kOwn; ++own)
      if (at.has(own, task.hidden) && at.lane % 4 == 0) {
        const Sequence sequence = shared.sequences[at.tile(own) * kSequences + at.lane / 4];
        if (step < sequence.length)
          *reinterpret_cast<Octet*>(task.out + task.row(sequence, step, at.direction) * task.hidden + at.unit) =
              states[own];
      }
  }
};

template <class S, class Exchange>
__global__ void __launch_bounds__(S::kThreads, 1) all_steps(LstmTask task) {
  Recurrence<S, Exchange>(task).run();
}

// Begins and order of sequences, longest first. A thread looks at all lengths for one sequence: that is quadratic, and
// the shortest way for as many as a batch has. Lengths below 0 count as 0 and none reaches beyond the tokens.
__global__ void sort_sequences(const int64_t* lengths, int count, int64_t tokens, Sequence* sorted, uint32_t* arrivals,
                               int groups) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < groups) arrivals[i] = 0;
  if (i >= count) return;
  const auto length = [&](int j) { return lengths[j] < 0 ? 0 : lengths[j] > tokens ? tokens : lengths[j]; };
  const int64_t own = length(i);
  int64_t begin = 0;
  int rank = 0;
#pragma unroll 8
  for (int j = 0; j < count; ++j) {
    const int64_t other = length(j);
    if (j < i) begin += other;
    if (other > own || (other == own && j < i)) ++rank;
  }
  const int64_t left = begin < tokens ? tokens - begin : 0;
  sorted[rank] = {(int32_t)begin, (int32_t)(own < left ? own : left)};
}

}  // namespace fastkd::cuda
