// Lanes of the vector layer that change places, by perfect shuffles. Included once per target by simd/vec.h; has no
// include guard on purpose.
namespace {

#if FASTKD_LANES == 16
#define FASTKD_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define FASTKD_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif FASTKD_LANES == 8
#define FASTKD_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define FASTKD_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FASTKD_LOW 0, 4, 1, 5
#define FASTKD_HIGH 2, 6, 3, 7
#endif
#if defined(__clang__)
#define FASTKD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTKD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecInt{__VA_ARGS__})
#endif

// Lane k of the result: all lanes of v[k] combined by f, in log2(kLanes) rounds of a perfect shuffle.
template <class F>
inline Vec fold_rows(const Vec* v, F f) {
  Vec folded[kLanes];
  std::memcpy(folded, v, sizeof folded);
  for (int count = kLanes / 2; count > 0; count /= 2)
    for (int i = 0; i < count; ++i)
      folded[i] = f(FASTKD_SHUFFLE(folded[i], folded[i + count], FASTKD_LOW),
                    FASTKD_SHUFFLE(folded[i], folded[i + count], FASTKD_HIGH));
  return folded[0];
}

// All lanes combined by f, in every lane.
template <class F>
inline Vec fold_lanes(Vec v, F f) {
  for (int count = kLanes / 2; count > 0; count /= 2)
    v = f(FASTKD_SHUFFLE(v, v, FASTKD_LOW), FASTKD_SHUFFLE(v, v, FASTKD_HIGH));
  return v;
}

// Rows become lanes, in place: each round of perfect shuffles moves one bit of the lane's index into the row's.
inline void transpose(Vec* v) {
  for (int round = 1; round < kLanes; round *= 2) {
    Vec shuffled[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      shuffled[2 * i] = FASTKD_SHUFFLE(v[i], v[i + kLanes / 2], FASTKD_LOW);
      shuffled[2 * i + 1] = FASTKD_SHUFFLE(v[i], v[i + kLanes / 2], FASTKD_HIGH);
    }
    std::memcpy(v, shuffled, sizeof shuffled);
  }
}

#undef FASTKD_LOW
#undef FASTKD_HIGH
#undef FASTKD_SHUFFLE

}  // namespace
