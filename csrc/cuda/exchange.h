// How the thread blocks of a group tell one another the hidden state. Both ways have the same calls.
#pragma once

#include "cuda/lstm_step.h"

namespace fastkd::cuda {

struct LstmTask {
  const uint16_t *gates, *weight;  // (tokens, directions, 4 hidden), (directions, 4 hidden, hidden)
  uint16_t* out;                   // (tokens, directions, hidden)
  const Sequence* sequences;       // longest first
  uint32_t* arrivals;              // per group, zero
  int count;                       // of sequences
  int directions, hidden;          // direction 1 goes back in time
  int members, groups;             // members: thread blocks of a group

  // Of all tokens and directions.
  __device__ int64_t row(const Sequence& sequence, int step, int direction) const {
    return (int64_t)sequence.token(step, direction == 1) * directions + direction;
  }
};

union States {
  uint16_t unit[kUnits];
  Octet all;
};

// What a thread block has in shared memory.
template <class S, int kBuffers>
struct Shared {
  Octet hidden[kBuffers][S::kRows * S::kDepth / 8];
  Octet gates[S::kWarps][kStages][S::kOwn][kGates * kSequences];
  Quad partial[S::kParts > 1 ? S::kWarps : 1][S::kTiles][2][32];
  States fresh[S::kWarps][S::kOwn][kSequences];
  Sequence sequences[S::kRows];
  uint64_t filled[kBuffers];  // a cluster's barriers
};

// What a thread is and works on at present.
template <class S>
struct Place {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = warp % S::kBlocks, part = warp / S::kBlocks;
  int member, group, unit;  // unit: the first of the warp's eight
  int direction = 0;

  __device__ explicit Place(const LstmTask& task)
      : member(blockIdx.x % task.members),
        group(blockIdx.x / task.members),
        unit(member * S::kBlockUnits + block * kUnits) {}

  // The tiles whose cells this warp finishes are divided among those that share its units.
  __device__ int tile(int own) const { return own * S::kParts + part; }
  __device__ bool has(int own, int hidden) const { return unit < hidden && tile(own) < S::kTiles; }
};

// By the hardware's cluster: everybody sends its part of the hidden state into everybody's shared memory, and waits for
// all parts to have come. Two buffers are enough: a block sends its part of one only when it has done with the other,
// and nobody goes on before all have sent.
template <class S>
struct ClusterExchange {
  static constexpr int kBuffers = 2, kMostParts = 2, kFewestMembers = 2;
  uint32_t count = 0;

  __device__ void begin(Shared<S, kBuffers>& shared) {
    if (threadIdx.x == 0)
      for (uint64_t& barrier : shared.filled) init_barrier(&barrier);
    sync_cluster();
  }

  // The output leaves for memory when the rest is on its way: nobody waits for it.
  template <class Write>
  __device__ __forceinline__ void send(Shared<S, kBuffers>& shared, const LstmTask& task, const Place<S>& at,
                                       const Octet (&states)[S::kOwn], Write write) {
    uint64_t* barrier = &shared.filled[count % 2];
    if (threadIdx.x == 0) arrive_expecting(barrier, S::kRows * task.hidden * sizeof(uint16_t));
#pragma unroll
    for (int own = 0; own < S::kOwn; ++own)
      if (at.has(own, task.hidden)) {
        const int row = at.tile(own) * kSequences + at.lane / 4;
        Octet* to = &shared.hidden[count % 2][octet_at<S>(row, at.unit / 64, at.unit / 8 % 8)];
        for (int rank = at.lane % 4; rank < task.members; rank += 4) cuda::send(to, barrier, rank, states[own]);
      }
    write();
  }

  __device__ __forceinline__ const Octet* receive(Shared<S, kBuffers>& shared, const LstmTask& task, const Place<S>& at,
                                                  int) {
    // Nobody waits for a warp without units: on its own it could fall behind by two phases, which look like none.
    if (S::kParts > 1 || at.unit < task.hidden) wait_for_phase(&shared.filled[count % 2], count / 2 % 2);
    __syncwarp();  // products are taken by whole warps
    return shared.hidden[count++ % 2];
  }

  // Everybody has done with the buffers, and nothing is on its way into a block that may leave.
  __device__ void end(Shared<S, kBuffers>& shared, const LstmTask& task, const Place<S>& at) {
    receive(shared, task, at, 0);
  }
};

// By the output in global memory and a counter of arrivals, for groups that no cluster holds: the launch has to keep
// all thread blocks resident.
template <class S>
struct GlobalExchange {
  static constexpr int kBuffers = 1, kMostParts = 4, kFewestMembers = 1;
  uint32_t expected = 0;

  __device__ void begin(Shared<S, kBuffers>&) { __syncthreads(); }

  template <class Write>
  __device__ __forceinline__ void send(Shared<S, kBuffers>&, const LstmTask& task, const Place<S>& at,
                                       const Octet (&)[S::kOwn], Write write) {
    write();
    __syncthreads();
    if (threadIdx.x == 0) add_release(&task.arrivals[at.group]);
    expected += task.members;
  }

  __device__ __forceinline__ const Octet* receive(Shared<S, kBuffers>& shared, const LstmTask& task, const Place<S>& at,
                                                  int step) {
    if (threadIdx.x == 0)
      while (load_acquire(&task.arrivals[at.group]) - expected > UINT32_MAX / 2) {
      }
    __syncthreads();
    for (int row = at.warp; row < S::kRows; row += S::kWarps) {
      const Sequence sequence = shared.sequences[row];
      if (step >= sequence.length) continue;  // over: nobody looks at its state
      const uint16_t* from = task.out + task.row(sequence, step - 1, at.direction) * task.hidden;
      for (int octet = at.lane; octet < task.hidden / 8; octet += 32)
        copy_async(&shared.hidden[0][octet_at<S>(row, octet / 8, octet % 8)], from + 8 * octet, true);
    }
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    return shared.hidden[0];
  }

  __device__ void end(Shared<S, kBuffers>&, const LstmTask&, const Place<S>&) {}
};

}  // namespace fastkd::cuda
