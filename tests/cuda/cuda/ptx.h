// csrc/cuda/ptx.h for a CPU: the same names, as the PTX manual describes the instructions.
#pragma once

#include <cmath>
#include <cstring>

#include "emulator.h"

namespace fastkd::cuda {

struct alignas(16) Octet {
  uint32_t pair[4];
};

inline char* shared_memory() { return emulator::block().shared; }

// Shows all lanes of the warp what each has brought, and returns where it is.
inline uint32_t (&show(std::initializer_list<uint32_t> mine)) [emulator::kWarp][8] {
  auto& all = emulator::warp().registers[emulator::current->turn++ % 2];
  std::copy(mine.begin(), mine.end(), all[emulator::lane()]);
  __syncwarp();
  return all;
}

template <class Format>
struct Element {
  static float low(uint32_t pair) { return Format::widen((uint16_t)pair); }
  static float high(uint32_t pair) { return Format::widen((uint16_t)(pair >> 16)); }
  static float part(uint32_t pair, int i) { return i ? high(pair) : low(pair); }

  // "Matrix fragments for mma.m16n8k16 with floating point type".
  static void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto& all = show({a[0], a[1], a[2], a[3], b0, b1});
    for (int i = 0; i < 4; ++i) {
      const int row = emulator::lane() / 4 + i / 2 * 8, column = emulator::lane() % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k)
        sum[i] += part(all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) *
                  part(all[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
    }
  }
};

struct BFloat16 : Element<BFloat16> {
  static float widen(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
  static uint16_t round(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

struct Half : Element<Half> {
  static float widen(uint16_t bits) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return x;
  }
  static uint16_t round(float wide) {
    const _Float16 x = (_Float16)wide;
    uint16_t bits;
    std::memcpy(&bits, &x, 2);
    return bits;
  }
};

// Off by as much as the instruction may be; the same for the same x.
inline float off_by(float y, float x, float largest) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return y * (1 + largest * ((int)(bits * 2654435761u >> 16) - 32768) / 32768);
}
inline float exp2_approx(float x) { return off_by(std::exp2(x), x, 0x1p-22f); }
inline float reciprocal_approx(float x) { return off_by(1 / x, x, 0x1p-23f); }

inline Octet load_transposed(const Octet* row) {
  emulator::check_shared(row, sizeof(Octet), emulator::current->block);
  const unsigned lane = emulator::lane();
  auto& rows = emulator::warp().addresses[emulator::current->turn++ % 2];
  rows[lane] = (const uint16_t*)row;
  __syncwarp();
  Octet v;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint16_t low = rows[matrix * 8 + lane % 4 * 2][lane / 4],
                   high = rows[matrix * 8 + lane % 4 * 2 + 1][lane / 4];
    v.pair[matrix] = low | (uint32_t)high << 16;
  }
  return v;
}

inline void copy_async(Octet* to, const void* from, bool valid) {
  emulator::check_shared(to, sizeof(Octet), emulator::current->block);
  const char* begin = (const char*)from;
  const auto holds = [&](const emulator::Range& range) { return begin >= range.begin && begin + 16 <= range.end; };
  if (valid && ((uintptr_t)from % 16 != 0 || std::none_of(emulator::readable.begin(), emulator::readable.end(), holds)))
    emulator::fail("a copy from nowhere");
  emulator::current->open.push_back({(char*)to, begin, valid});
}

inline void commit_copies() {
  emulator::current->groups.push_back(std::move(emulator::current->open));
  emulator::current->open.clear();
  if (emulator::chance(0.2)) emulator::perform(emulator::current->groups.back());
}

template <int kPending>
inline void wait_for_copies() {
  auto& groups = emulator::current->groups;
  for (; groups.size() > kPending; groups.pop_front()) emulator::perform(groups.front());
}

struct PhaseBarrier {
  int32_t bytes;
  uint16_t missing, phase;

  void change(int32_t more, int arrivals) {
    if (missing < arrivals) emulator::fail("two threads arrived in one phase of a barrier");
    bytes += more;
    missing = (uint16_t)(missing - arrivals);
    if (missing == 0 && bytes == 0) ++phase, missing = 1;
  }
};
static_assert(sizeof(PhaseBarrier) == sizeof(uint64_t));

inline void init_barrier(uint64_t* barrier) { *(PhaseBarrier*)barrier = {0, 1, 0}; }

inline void sync_cluster() {
  auto& barrier = emulator::clusters[blockIdx.x / emulator::cluster_blocks];
  emulator::wait_at(barrier, emulator::cluster_blocks * blockDim.x);
}

inline void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  ((PhaseBarrier*)barrier)->change((int32_t)bytes, 1);
  emulator::progress = true;
}

inline void wait_for_phase(uint64_t* barrier, uint32_t parity) {
  emulator::wait_until([=] { return ((PhaseBarrier*)barrier)->phase % 2 != parity; });
}

inline void send(Octet* to, uint64_t* barrier, uint32_t rank, const Octet& v) {
  const unsigned own = emulator::current->block,
                 there = own / emulator::cluster_blocks * emulator::cluster_blocks + rank;
  if (rank >= emulator::cluster_blocks || emulator::cluster_blocks < 2) emulator::fail("no such block in the cluster");
  emulator::check_shared(to, sizeof(Octet), own);
  const auto in_block = [&](void* p) {
    return emulator::blocks[there].shared + ((char*)p - emulator::blocks[own].shared);
  };
  auto* target = (Octet*)in_block(to);
  auto* counter = (PhaseBarrier*)in_block(barrier);
  emulator::messages.push_back([=] {
    *target = v;
    counter->change(-(int32_t)sizeof(Octet), 0);
  });
}

inline void add_release(uint32_t* counter) {
  ++*counter;
  emulator::progress = true;
}

inline uint32_t load_acquire(const uint32_t* counter) {
  emulator::wait_until([] { return true; });
  return *counter;
}

}  // namespace fastkd::cuda
