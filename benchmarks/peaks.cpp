// What a core can do at most, for roofline.py: multiply-adds and bytes read per second. Compiled for the machine at
// hand.
#include <chrono>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
typedef float Vec __attribute__((vector_size(64)));
#elif defined(__AVX__)
typedef float Vec __attribute__((vector_size(32)));
#else
typedef float Vec __attribute__((vector_size(16)));
#endif

namespace {

constexpr int kChains = 12;  // independent sums, more than an FMA unit has in flight, fewer than there are registers
constexpr int kLanes = sizeof(Vec) / sizeof(float);

#if defined(__x86_64__)
#define KEEP_IN_REGISTER(x) asm volatile("" : "+v"(x))
#else
#define KEEP_IN_REGISTER(x) asm volatile("" : "+w"(x))
#endif

// Calls f until the time is up; how often per second.
template <class F>
double calls_per_second(double seconds, F f) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  for (int64_t calls = 1;; ++calls) {
    f();
    const double taken = std::chrono::duration<double>(Clock::now() - begin).count();
    if (taken > seconds) return calls / taken;
  }
}

constexpr int kRepeats = 20000;

}  // namespace

extern "C" {

// Floating-point operations, two per multiply-add.
double float_rate(double seconds) {
  const double rate = calls_per_second(seconds, [] {
    Vec sum[kChains] = {}, a = {}, b = {};
    for (int i = 0; i < kRepeats; ++i) {
      KEEP_IN_REGISTER(a);
#pragma GCC unroll 12
      for (int k = 0; k < kChains; ++k) {
        sum[k] = a * b + sum[k];
        KEEP_IN_REGISTER(sum[k]);
      }
    }
  });
  return rate * kRepeats * kChains * kLanes * 2;
}

// The same of bytes summed up in 32 bits; 0 where no instruction does it.
double byte_rate(double seconds) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#if defined(__AVX512VNNI__)
  typedef __m512i Bytes;
#define DOT_PRODUCT "vpdpbusd %2, %1, %0"
#else
  typedef __m256i Bytes;
#define DOT_PRODUCT "%{vex%} vpdpbusd %2, %1, %0"
#endif
  const double rate = calls_per_second(seconds, [] {
    Bytes sum[kChains] = {}, a = {}, b = {};
    for (int i = 0; i < kRepeats; ++i)
#pragma GCC unroll 12
      for (int k = 0; k < kChains; ++k) asm volatile(DOT_PRODUCT : "+v"(sum[k]) : "v"(a), "v"(b));
  });
  return rate * kRepeats * kChains * sizeof(Bytes) * 2;
#else
  return seconds * 0;
#endif
}

// Bytes read from a buffer of whole vectors, again and again.
double read_rate(const void* buffer, int64_t bytes, double seconds) {
  const Vec* from = (const Vec*)buffer;
  const int64_t vectors = bytes / (int64_t)sizeof(Vec);
  const double rate = calls_per_second(seconds, [&] {
    for (int64_t i = 0; i < vectors; ++i) {
      Vec x = from[i];
      KEEP_IN_REGISTER(x);
    }
  });
  return rate * vectors * sizeof(Vec);
}
}
