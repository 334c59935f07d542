// The vector layer: FASTKD_LANES floats as one value, by the compiler's vector extensions, so that one source serves
// every target. Included once per target by foreach_target.h; has no include guard on purpose.
namespace {

constexpr int kLanes = FASTKD_LANES;
typedef float Vec __attribute__((vector_size(4 * FASTKD_LANES)));
typedef int32_t VecInt __attribute__((vector_size(4 * FASTKD_LANES)));
typedef uint32_t VecBits __attribute__((vector_size(4 * FASTKD_LANES)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * FASTKD_LANES)));

#if defined(FASTKD_AVX512) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2e = 1.442695041f;

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline Vec splat(float x) { return x - Vec{}; }  // not Vec{} + x, which is an addition: it makes 0 of -0

inline VecInt as_int(Vec x) { return (VecInt)x; }
inline Vec as_float(VecInt x) { return (Vec)x; }

inline Vec select(VecInt condition, Vec yes, Vec no) { return condition ? yes : no; }

// The larger of both; b where either is NaN.
inline Vec max(Vec a, Vec b) {
#if defined(FASTKD_AVX512)
  return (Vec)_mm512_maskz_max_ps(-1, (__m512)a, (__m512)b);
#elif defined(FASTKD_AVX2)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline Vec min(Vec a, Vec b) {
#if defined(FASTKD_AVX512)
  return (Vec)_mm512_maskz_min_ps(-1, (__m512)a, (__m512)b);
#elif defined(FASTKD_AVX2)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

inline bool any(VecInt condition) {
#if defined(FASTKD_AVX512)
  return _mm512_movepi32_mask((__m512i)condition) != 0;
#elif defined(FASTKD_AVX2)
  return _mm256_movemask_ps((__m256)condition) != 0;
#else
  bool found = false;
  for (int k = 0; k < kLanes; ++k) found |= condition[k] != 0;
  return found;
#endif
}

inline VecInt lane_index() {
  VecInt v;
  for (int k = 0; k < kLanes; ++k) v[k] = k;
  return v;
}
inline Vec iota() { return __builtin_convertvector(lane_index(), Vec); }

// n rounded up to whole vectors.
inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// a * b + c, rounded once where the target can. Written out, and contraction left off in the build, so that one
// expression has one value wherever it is inlined.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(FASTKD_AVX512)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(FASTKD_AVX2)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// 2^x for x <= 1; exactly 0 below -126.5, NaN stays NaN. Relative error below 1e-7 down to -126, by a minimax
// polynomial in the fraction (1.6e-8 before rounding).
inline Vec exp2(Vec x) {
  // 1.5 * 2^23 + 127: adding it leaves the rounded integer in the low bits, already biased as an exponent.
  const Vec rounder = splat(12583039.0f);
  const Vec clamped = max(splat(-127.0f), x);
  const Vec shifted = clamped + rounder;
  const Vec f = clamped - (shifted - rounder);
  Vec p = splat(1.53533619e-4f);
  p = fma(p, f, splat(1.33988746e-3f));
  p = fma(p, f, splat(9.61843692e-3f));
  p = fma(p, f, splat(5.55033237e-2f));
  p = fma(p, f, splat(2.40226477e-1f));
  p = fma(p, f, splat(6.93147182e-1f));
  p = fma(p, f, splat(1.0f));
  return p * as_float(as_int(shifted) << 23);
}

// Natural logarithm of a positive normal number, by the series of atanh around 1; error below 1 ULP.
inline Vec log(Vec x) {
  const VecInt bits = as_int(x);
  const VecInt exponent = (bits - 0x3f3504f3) >> 23;  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
  const Vec n = __builtin_convertvector(exponent, Vec);
  const Vec f = as_float(bits - (exponent << 23)) - 1.0f;
  const Vec s = f / (2.0f + f), s2 = s * s;
  Vec p = splat(0.22222222f);
  p = fma(p, s2, splat(0.28571429f));
  p = fma(p, s2, splat(0.4f));
  p = fma(p, s2, splat(0.66666667f));
  p = p * s2;
  // log(1 + f) = f - s * (f - p), which keeps the bits of a small f; ln 2 in two parts, the first exact times n.
  const Vec fraction = f - s * (f - p);
  return fma(n, splat(0.693359375f), fma(n, splat(-2.12194440e-4f), fraction));
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline VecBits load_bits(const void* p) {
#if defined(FASTKD_AVX512)
  return (VecBits)_mm512_maskz_cvtepu16_epi32(-1, _mm256_loadu_si256((const __m256i*)p));
#elif defined(FASTKD_AVX2)
  return (VecBits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));  // GCC makes five instructions of the rest
#else
  VecHalf h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, VecBits);
#endif
}

// The low 16 bits of each lane, of which the others are 0.
inline void store_bits(void* p, VecBits bits) {
#if defined(FASTKD_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtepi32_epi16(-1, (__m512i)bits));
#elif defined(FASTKD_AVX2)
  const __m256i b = (__m256i)bits;
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1)));
#else
  const VecHalf h = __builtin_convertvector(bits, VecHalf);
  std::memcpy(p, &h, sizeof h);
#endif
}

inline Vec load(const BFloat16* p) { return (Vec)(load_bits(p) << 16); }

inline Vec load(const Half* p) {
#if defined(FASTKD_AVX512)
  return (Vec)_mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256((const __m256i*)p));
#elif defined(FASTKD_AVX2)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  const VecBits h = load_bits(p);
  const Vec magnitude = (Vec)((h & 0x7fff) << 13) * 0x1p112f;  // moves the exponent's bias from 15 to 127
  const VecBits special = (VecBits)((h & 0x7c00) == 0x7c00) & 0x7f800000;
  return (Vec)((VecBits)magnitude | special | ((h & 0x8000) << 16));
#endif
}

inline float to_float(Half x) {
  Half lanes[kLanes] = {x};
  return load(lanes)[0];
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline VecBits bfloat16_bits(Vec v) {
  const VecBits bits = (VecBits)v;
  const VecBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (VecBits)(v != v) ? VecBits{} + 0x7fc0 : rounded;
}

inline void store(BFloat16* p, Vec v) { store_bits(p, bfloat16_bits(v)); }

inline void store(Half* p, Vec v) {
#if defined(FASTKD_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(-1, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(FASTKD_AVX2)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  const VecBits bits = (VecBits)v, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Below 2^-14 the addition of 0.5 rounds to half precision's fixed spacing; above, the carry does.
  const VecBits tiny = (VecBits)((Vec)magnitude + 0.5f) - 0x3f000000;
  const VecBits normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  VecBits h = (VecBits)(magnitude < 0x38800000) ? tiny : normal;
  h = (VecBits)(magnitude >= 0x477ff000) ? VecBits{} + 0x7c00 : h;
  h = (VecBits)(magnitude > 0x7f800000) ? VecBits{} + 0x7e00 : h;
  store_bits(p, h | sign);
#endif
}

// p[0], p[stride], ...: of the lanes from n on, p[0] again.
template <class T>
inline Vec load_strided(const T* p, int64_t stride, int64_t n) {
#if defined(FASTKD_AVX512)
  if constexpr (std::is_same<T, float>::value) {
    if (n == kLanes && stride < 1 << 24)
      return (Vec)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, (__m512i)(lane_index() * (int)stride), p, 4);
  }
#endif
  float lanes[kLanes];
  for (int k = 0; k < kLanes; ++k) lanes[k] = to_float(p[(k < n ? k : 0) * stride]);
  return load(lanes);
}

// The first n < kLanes values, the other lanes -inf.
inline Vec load_tail(const float* p, int64_t n) {
#if defined(FASTKD_AVX512)
  return (Vec)_mm512_mask_loadu_ps((__m512)splat(-kInfinity), (1u << n) - 1, p);
#else
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? p[i] : -kInfinity;
  return load(lanes);
#endif
}

template <class T>
inline Vec load_tail(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  const Vec v = load(lanes);
  return select(iota() < splat((float)n), v, splat(-kInfinity));
}

inline void store_tail(float* p, Vec v, int64_t n) {
#if defined(FASTKD_AVX512)
  _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
#else
  std::memcpy(p, &v, n * sizeof(float));
#endif
}

template <class T>
inline void store_tail(T* p, Vec v, int64_t n) {
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

}  // namespace

#include "simd/shuffle.h"
