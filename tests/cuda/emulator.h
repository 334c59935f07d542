// A GPU played by one CPU thread, for kernels whose instructions come from cuda/ptx.h beside this.
//
// Every thread of a launch is a coroutine. It runs until it waits; who goes on is chosen at random, and some warps are
// far slower than others. What the hardware may do late (copies, stores into other blocks) happens as late as it may,
// or at random before. So a kernel that forgets to wait computes something wrong, and one that waits in vain is caught.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim;

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 << 10;

[[noreturn]] inline void fail(const char* what) {
  std::printf("block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::exit(1);
}

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Copy {
  char* to;
  const char* from;
  bool valid;
};

struct Warp {
  Barrier barrier;
  uint32_t registers[2][kWarp][8];  // what lanes show one another: two, that a fast lane may go on to the next
  const uint16_t* addresses[2][kWarp];
  double laziness;  // how often it is passed over
};

struct Block {
  std::vector<char> memory;
  char* shared;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  unsigned index, block;
  bool done = false;
  std::function<bool()> ready = [] { return true; };
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  unsigned turn = 0;
};

struct Range {
  const char *begin, *end;
};

inline std::mt19937 random_bits;
inline std::vector<Block> blocks;
inline std::vector<std::unique_ptr<Thread>> threads;
inline std::vector<Barrier> clusters;
inline std::deque<std::function<void()>> messages;  // between blocks
inline std::vector<Range> readable;                 // by copies from global memory
inline unsigned cluster_blocks;
inline Thread* current;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline bool progress;

inline bool chance(double p) { return std::uniform_real_distribution<>(0, 1)(random_bits) < p; }
inline Block& block() { return blocks[current->block]; }
inline Warp& warp() { return block().warps[current->index / kWarp]; }
inline unsigned lane() { return current->index % kWarp; }

inline void wait_until(std::function<bool()> ready) {
  current->ready = std::move(ready);
  swapcontext(&current->context, &scheduler);
}

inline void wait_at(Barrier& barrier, unsigned size) {
  const unsigned generation = barrier.generation;
  progress = true;
  if (++barrier.arrived == size) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  wait_until([&barrier, generation] { return barrier.generation != generation; });
}

inline void check_shared(const void* p, size_t bytes, unsigned in) {
  const Block& owner = blocks[in];
  const char* begin = (const char*)p;
  if (begin < owner.shared || begin + bytes > owner.memory.data() + owner.memory.size()) fail("not shared memory");
}

inline void perform(std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    for (int i = 0; i < 16; ++i) copy.to[i] = copy.valid ? copy.from[i] : 0;
  }
  group.clear();
}

inline void deliver(size_t at_most) {
  for (; at_most > 0 && !messages.empty(); --at_most) {
    std::swap(messages.front(), messages[random_bits() % messages.size()]);
    const auto message = std::move(messages.front());
    messages.pop_front();
    message();
    progress = true;
  }
}

inline void resume(Thread& thread) {
  current = &thread;
  threadIdx.x = thread.index;
  blockIdx.x = thread.block;
  swapcontext(&scheduler, &thread.context);
}

inline void enter() {
  body();
  current->done = progress = true;
  swapcontext(&current->context, &scheduler);
}

inline void set_up(unsigned grid, unsigned block_threads, unsigned cluster, size_t shared_bytes) {
  blockDim.x = block_threads;
  cluster_blocks = cluster;
  clusters.assign(grid / cluster, {});
  blocks.assign(grid, {});
  threads.clear();
  for (unsigned b = 0; b < grid; ++b) {
    blocks[b].memory.assign(shared_bytes + 128, (char)0xff);  // NaN
    blocks[b].shared = blocks[b].memory.data() + (128 - (uintptr_t)blocks[b].memory.data() % 128);
    blocks[b].memory.resize(blocks[b].shared - blocks[b].memory.data() + shared_bytes);
    blocks[b].warps.resize((block_threads + kWarp - 1) / kWarp);
    for (Warp& each : blocks[b].warps) each.laziness = chance(0.3) ? 0.9 : 0;
    for (unsigned t = 0; t < block_threads; ++t) {
      auto& thread = *threads.emplace_back(new Thread);
      thread.index = t, thread.block = b;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStack;
      makecontext(&thread.context, enter, 0);
    }
  }
}

// Runs `kernel` in every thread of `grid` blocks, of which each `cluster` share their memory.
inline void launch(unsigned grid, unsigned block_threads, unsigned cluster, size_t shared_bytes, unsigned seed,
                   std::function<void()> kernel) {
  random_bits.seed(seed);
  body = std::move(kernel);
  set_up(grid, block_threads, cluster, shared_bytes);
  std::vector<size_t> warps;  // the first thread of each
  for (size_t t = 0; t < threads.size(); ++t)
    if (threads[t]->index % kWarp == 0) warps.push_back(t);
  for (int idle = 0; !warps.empty(); idle = progress ? 0 : idle + 1) {
    if (idle > 1000) fail("waits for ever");
    progress = false;
    std::shuffle(warps.begin(), warps.end(), random_bits);
    for (size_t first : warps) {
      if (chance(blocks[threads[first]->block].warps[threads[first]->index / kWarp].laziness)) continue;
      for (size_t t = first; t < threads.size() && (t == first || threads[t]->index % kWarp != 0); ++t)
        if (!threads[t]->done && threads[t]->ready()) resume(*threads[t]);
    }
    deliver(random_bits() % (messages.size() + 1));
    std::erase_if(warps, [](size_t first) {
      for (size_t t = first; t < threads.size() && (t == first || threads[t]->index % kWarp != 0); ++t)
        if (!threads[t]->done) return false;
      return true;
    });
  }
  if (!messages.empty()) fail("a store was still on its way");
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait_at(emulator::block().barrier, blockDim.x); }
inline void __syncwarp() { emulator::wait_at(emulator::warp().barrier, emulator::kWarp); }
