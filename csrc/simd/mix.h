// A weighted sum of two rows. Compiled once per target.
namespace {

// out = a x + b y. Plain stores: where an output's pages are fresh, stores past the caches measured no faster.
template <class T>
inline void mix(T* out, const T* x, const T* y, float weight, float partner_weight, int64_t n) {
  const Vec a = splat(weight), b = splat(partner_weight);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, fma(a, load(x + i), b * load(y + i)));
  if (i < n) store_tail(out + i, fma(a, load_tail(x + i, n - i), b * load_tail(y + i, n - i)), n - i);
}

}  // namespace
