// A weighted sum of two rows. Compiled once per target.
namespace {

// Whole steps of out = a x + b y from element i on; returns where they end. Plain stores: where an output's pages are
// fresh, stores past the caches measured no faster.
template <class T>
inline int64_t mix_steps(T* out, const T* x, const T* y, Vec a, Vec b, int64_t i, int64_t n) {
  for (; i + kLanes <= n; i += kLanes) store(out + i, fma(a, load(x + i), b * load(y + i)));
  return i;
}

// Two bfloat16 share a lane, each widened by a shift or a mask where it stands: half the shuffles of load and store.
inline int64_t mix_pairs(BFloat16* out, const BFloat16* x, const BFloat16* y, Vec a, Vec b, int64_t n) {
  const auto rounded = [](Vec v) {
    const VecBits bits = (VecBits)v;
    return (VecBits)(v != v) ? VecBits{} + 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    VecBits p, q;
    std::memcpy(&p, x + i, sizeof p);
    std::memcpy(&q, y + i, sizeof q);
    const VecBits low = rounded(fma(a, (Vec)(p << 16), b * (Vec)(q << 16)));
    const VecBits high = rounded(fma(a, (Vec)(p & 0xffff0000), b * (Vec)(q & 0xffff0000)));
    const VecBits both = (low >> 16) | (high & 0xffff0000);
    std::memcpy(out + i, &both, sizeof both);
  }
  return i;
}
template <class T>
inline int64_t mix_pairs(T*, const T*, const T*, Vec, Vec, int64_t) {
  return 0;
}

template <class T>
inline void mix(T* out, const T* x, const T* y, float weight, float partner_weight, int64_t n) {
  const Vec a = splat(weight), b = splat(partner_weight);
  const int64_t i = mix_steps(out, x, y, a, b, mix_pairs(out, x, y, a, b, n), n);
  if (i < n) store_tail(out + i, fma(a, load_tail(x + i, n - i), b * load_tail(y + i, n - i)), n - i);
}

}  // namespace
