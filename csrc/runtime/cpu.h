// What the CPU at hand can do beyond the targets of simd/dispatch.h.
#pragma once

#include <cstdlib>
#include <cstring>

namespace fastkd::runtime {

// Products of bytes in one instruction (AVX-512 VNNI); FASTKD_CPU_TARGET=avx512-no-vnni does without.
inline bool has_vnni() {
#if defined(__x86_64__)
  static const bool has = [] {
    const char* wanted = std::getenv("FASTKD_CPU_TARGET");
    return __builtin_cpu_supports("avx512vnni") && !(wanted && std::strcmp(wanted, "avx512-no-vnni") == 0);
  }();
  return has;
#else
  return false;
#endif
}

}  // namespace fastkd::runtime
