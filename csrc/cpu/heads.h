// What the kernels of attention share.
#pragma once

#include <cstdint>

namespace fastkd {

// One (batch, heads, tokens, dim) tensor: its strides in elements, the last dimension dense.
struct Heads {
  void* data;
  int64_t batch, head, token;
};

}  // namespace fastkd
