// Chooses at run time which of the compiled instruction sets this CPU can run.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>

namespace fastkd {

enum class Target { baseline, avx2, avx512 };

inline Target best_target() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Target::avx512;
  if (avx2) return Target::avx2;
#endif
  return Target::baseline;
}

// The best target, lowered by FASTKD_CPU_TARGET=baseline|avx2|avx512 or a variant of these; never raised above what the
// CPU has.
inline Target target() {
  static const Target chosen = [] {
    const Target best = best_target();
    const char* wanted = std::getenv("FASTKD_CPU_TARGET");
    if (wanted == nullptr) return best;
    if (std::strcmp(wanted, "baseline") == 0) return Target::baseline;
    if (std::strncmp(wanted, "avx2", 4) == 0 && best >= Target::avx2) return Target::avx2;
    return best;
  }();
  return chosen;
}

// Floats of its vectors.
inline int lanes() { return target() == Target::avx512 ? 16 : target() == Target::avx2 ? 8 : 4; }

// Whether the assembler knows VNNI without AVX-512 (AVX-VNNI), going by the compiler's age.
#if defined(__clang__)
constexpr bool kAssemblesAvxVnni = __clang_major__ >= 12;
#else
constexpr bool kAssemblesAvxVnni = __GNUC__ >= 11;
#endif

// Products of bytes in one instruction (VNNI); FASTKD_CPU_TARGET=avx512-no-vnni and avx2-no-vnni do without.
inline bool has_vnni() {
#if defined(__x86_64__)
  static const bool has = [] {
    constexpr unsigned kAvxVnni = 1u << 4;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const char* wanted = std::getenv("FASTKD_CPU_TARGET");
    if (wanted != nullptr && std::strstr(wanted, "no-vnni") != nullptr) return false;
    if (target() == Target::avx512) return __builtin_cpu_supports("avx512vnni") != 0;
    return kAssemblesAvxVnni && target() == Target::avx2 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) &&
           eax & kAvxVnni;
  }();
  return has;
#else
  return false;
#endif
}

// Products of bfloat16 pairs in one instruction (AVX512-BF16); FASTKD_CPU_TARGET=avx512-no-bf16 does without.
inline bool has_bfloat16_pairs() {
#if defined(__x86_64__)
  static const bool has = [] {
    const char* wanted = std::getenv("FASTKD_CPU_TARGET");
    return target() == Target::avx512 && __builtin_cpu_supports("avx512bf16") &&
           !(wanted && std::strcmp(wanted, "avx512-no-bf16") == 0);
  }();
  return has;
#else
  return false;
#endif
}

// Products of whole tiles of such pairs (Intel AMX), which Linux grants a process that asks;
// FASTKD_CPU_TARGET=avx512-no-amx does without.
inline bool has_bfloat16_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool has = [] {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
    constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const char* wanted = std::getenv("FASTKD_CPU_TARGET");
    return has_bfloat16_pairs() && !(wanted && std::strcmp(wanted, "avx512-no-amx") == 0) &&
           __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && edx & kBfloat16 && edx & kTiles &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
#else
  return false;
#endif
}

}  // namespace fastkd
