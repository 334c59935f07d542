// What the checks of csrc/simd share: expectations that are counted, and scalar arithmetic in double to expect from.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>

inline int failures = 0;

inline void expect(bool condition, const char* target, const char* what, double got, double wanted) {
  if (condition) return;
  if (++failures <= 20) std::printf("%s: %s: got %.9g, expected %.9g\n", target, what, got, wanted);
}

inline bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

inline float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline double decode_bfloat16(uint16_t bits) { return float_of((uint32_t)bits << 16); }

inline double decode_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

// x rounded to the nearest value, ties to even, of a format with that many bits of significand.
inline double rounded(double x, int significand, int lowest_exponent, double largest) {
  if (!std::isfinite(x) || x == 0) return x;
  const int exponent = std::ilogb(x) < lowest_exponent ? lowest_exponent : std::ilogb(x);
  const double unit = std::ldexp(1.0, exponent - significand + 1), r = std::nearbyint(x / unit) * unit;
  return std::fabs(r) > largest ? std::copysign(INFINITY, x) : r;
}
inline double rounded_to_bfloat16(double x) { return rounded(x, 8, -126, 3.3895313892515355e38); }
inline double rounded_to_half(double x) { return rounded(x, 11, -14, 65504.0); }
