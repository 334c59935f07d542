// Compiles FASTKD_SOURCE once per instruction set, each in a namespace of its name. Everything in it must be static or
// in an unnamed namespace: an inline function that escaped would let the linker hand AVX-512 code to an older CPU.
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include <cstdint>
#include <cstring>
#include <type_traits>

#define FASTKD_STRING(x) #x
#if defined(__clang__)
#define FASTKD_BEGIN(features) \
  _Pragma(FASTKD_STRING(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define FASTKD_END _Pragma("clang attribute pop")
#else
#define FASTKD_BEGIN(features) _Pragma("GCC push_options") _Pragma(FASTKD_STRING(GCC target(features)))
#define FASTKD_END _Pragma("GCC pop_options")
#endif

#define FASTKD_LANES 4
namespace fastkd::baseline {
#include "simd/vec.h"
#include FASTKD_SOURCE
}  // namespace fastkd::baseline
#undef FASTKD_LANES

#if defined(__x86_64__)
#define FASTKD_LANES 8
#define FASTKD_AVX2
FASTKD_BEGIN("avx2,fma,f16c")
namespace fastkd::avx2 {
#include "simd/vec.h"
#include FASTKD_SOURCE
}  // namespace fastkd::avx2
FASTKD_END
#undef FASTKD_LANES
#undef FASTKD_AVX2

#define FASTKD_LANES 16
#define FASTKD_AVX512
FASTKD_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace fastkd::avx512 {
#include "simd/vec.h"
#include FASTKD_SOURCE
}  // namespace fastkd::avx512
FASTKD_END
#undef FASTKD_LANES
#undef FASTKD_AVX512
#endif
