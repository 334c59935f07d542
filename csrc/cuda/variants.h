// Which shape of the kernel a hidden size takes.
#pragma once

#include "cuda/exchange.h"

namespace fastkd::cuda {

// Calls `f` with the shape; weights of 256 of the depth are all that a thread can keep in registers.
template <class Element, int kTiles, class F>
auto with_shape(int hidden, F f) {
  if (hidden <= 128) return f(Shape<Element, 4, 1, kTiles>{});
  if (hidden <= 256) return f(Shape<Element, 8, 1, kTiles>{});
  if (hidden <= 512) return f(Shape<Element, 8, 2, kTiles>{});
  return f(Shape<Element, 8, 4, kTiles>{});
}

// Thread blocks of a group.
template <class S>
constexpr int members_of(int hidden) {
  return (hidden + S::kBlockUnits - 1) / S::kBlockUnits;
}

// A cluster has at most 16 blocks, on some GPUs 8.
template <class S, class Exchange>
constexpr bool exists = S::kParts <= Exchange::kMostParts;

// And at least two: a block cannot send to itself alone.
template <class S, class Exchange>
constexpr bool serves(int hidden) {
  return exists<S, Exchange> && members_of<S>(hidden) >= Exchange::kFewestMembers;
}

}  // namespace fastkd::cuda
