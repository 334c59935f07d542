// Scratch memory of this thread, on a cache line; kept from call to call, since faulting it in anew costs more than a
// small call.
#pragma once

#include <cstdint>
#include <vector>

namespace fastkd {

inline float* scratch(int64_t floats) {
  constexpr int64_t kLine = 64 / sizeof(float);
  thread_local std::vector<float> memory;
  if ((int64_t)memory.size() < floats + kLine) memory.resize(floats + kLine);
  return (float*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
}

}  // namespace fastkd
