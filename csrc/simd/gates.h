// The non-linearities of an LSTM's gates, compiled once per target. Error below 1e-6.
namespace {

#if defined(FASTKD_AVX512)
inline Vec reciprocal(Vec x) {
  const Vec r = (Vec)_mm512_maskz_rcp14_ps(-1, (__m512)x);
  return r * fma(-x, r, splat(2.0f));
}
#else
inline Vec reciprocal(Vec x) { return 1.0f / x; }
#endif

// e^(factor * x), kept where a product of two of them is still a number.
inline Vec power(float factor, Vec x) { return exp2(max(splat(-60.0f), min(splat(60.0f), x * (factor * kLog2e)))); }

inline Vec sigmoid(Vec x) { return reciprocal(1.0f + power(-1, x)); }

inline Vec tanh(Vec x) {
  const Vec p = power(-2, x);
  return (1.0f - p) * reciprocal(1.0f + p);
}

}  // namespace
