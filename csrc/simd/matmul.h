// Register-tiled matrix products of operands that are packed once and used many times, compiled once per target.
//
// Operands are made of units of 32 bits: Singles are floats, Pairs two bfloat16 that are neighbours along the depth, so
// that the depth of a product in units is half. The left operand is read one unit at a time by any two strides, so that
// it may be a transpose; the right one is packed in rows whose width is a multiple of kPanel. The result is float32.
namespace {

#if FASTKD_LANES == 16
constexpr int kStrip = 8;
#else
constexpr int kStrip = 4;
#endif
constexpr int kPanel = 2 * kLanes;
// Units that are summed by themselves: the error of a sum grows with its length, and so many rows fit the L1 cache.
constexpr int64_t kDepth = 64;

struct Left {
  const float* data;
  int64_t row, depth;  // strides
};
struct Packed {
  float* data;
  int64_t row;  // stride
  float* at(int64_t i) const { return data + i * row; }
};

struct Singles {
  static constexpr int kPer = 1;  // values in a unit
#if defined(FASTKD_AVX2) || defined(FASTKD_AVX512) || defined(__aarch64__)
  using Sum = Vec;
  static Sum multiply_add(Vec a, Vec b, Sum c) { return fma(a, b, c); }
#else
  // Without a fused multiply-add each step would round twice, which is more than the tolerance allows.
  typedef double Sum __attribute__((vector_size(8 * FASTKD_LANES)));
  static Sum multiply_add(Vec a, Vec b, Sum c) {
    return __builtin_convertvector(a, Sum) * __builtin_convertvector(b, Sum) + c;
  }
#endif
};

#if defined(FASTKD_AVX512)
struct Pairs {
  static constexpr int kPer = 2;
  using Sum = Vec;
  // Written as assembly because the target that this is compiled for need not have it.
  static Sum multiply_add(Vec a, Vec b, Sum c) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
};
#endif

inline int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

template <class Unit>
int64_t units(int64_t n) {
  return (n + Unit::kPer - 1) / Unit::kPer;
}

// c (M, kPanel) = or += a (M, depth) · b (depth, kPanel).
template <class Unit, int M>
void product_tile(Left a, Packed b, int64_t depth, Packed c, bool accumulate) {
  typename Unit::Sum sum[M][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec first = load(b.at(k)), second = load(b.at(k) + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec x = splat(a.data[i * a.row + k * a.depth]);
      sum[i][0] = Unit::multiply_add(x, first, sum[i][0]);
      sum[i][1] = Unit::multiply_add(x, second, sum[i][1]);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < 2; ++v) {
      float* to = c.at(i) + v * kLanes;
      const Vec part = __builtin_convertvector(sum[i][v], Vec);
      store(to, accumulate ? load(to) + part : part);
    }
}

template <class Unit, int M>
void product_rest(int64_t rows, Left a, Packed b, int64_t depth, Packed c, bool accumulate) {
  if (rows == M) return product_tile<Unit, M>(a, b, depth, c, accumulate);
  if constexpr (M > 1) product_rest<Unit, M - 1>(rows, a, b, depth, c, accumulate);
}

// c (rows, kPanel) = or += a (rows, depth) · b (depth, kPanel), in parts of the depth.
template <class Unit>
void product(int64_t rows, Left a, Packed b, int64_t depth, Packed c, bool accumulate) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t part = std::min(kDepth, depth - k);
    int64_t i = 0;
    const auto left = [&] { return Left{a.data + i * a.row + k * a.depth, a.row, a.depth}; };
    for (; i + kStrip <= rows; i += kStrip)
      product_tile<Unit, kStrip>(left(), {b.at(k), b.row}, part, {c.at(i), c.row}, accumulate || k > 0);
    if (i < rows)
      product_rest<Unit, kStrip - 1>(rows - i, left(), {b.at(k), b.row}, part, {c.at(i), c.row}, accumulate || k > 0);
  }
}

// Floats from one row of a packed matrix to the next: an odd number of cache lines, so that rows fall into all sets.
inline int64_t packed_stride(int64_t columns) { return panels(columns) * kPanel + 16; }

inline void zero_row(int64_t n, float* to) { std::memset(to, 0, panels(n) * kPanel * sizeof(float)); }

// A row of values as units, zeros up to the end of its last panel.
template <class Unit, class T>
void pack_row(const T* from, int64_t n, float* to) {
  if constexpr (Unit::kPer == 2) {
    std::memcpy(to, from, n * sizeof(T));
    std::memset((T*)to + n, 0, panels(units<Unit>(n)) * kPanel * sizeof(float) - n * sizeof(T));
  } else {
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) store(to + j, load(from + j));
    if (j < n) store(to + j, select(iota() < splat((float)(n - j)), load_tail(from + j, n - j), Vec{}));
    for (j = padded(n); j < panels(n) * kPanel; ++j) to[j] = 0.0f;
  }
}

// Rows of units, packed along the columns, as the right operand of a product whose depth are these rows: Pairs hold two
// rows then. An odd last row needs one more of zeros.
template <class Unit>
Packed along_rows(Packed from, int64_t rows, int64_t columns, Packed to) {
  if constexpr (Unit::kPer == 1) return from;
  const auto half = [](const float* x) { return load_bits((const uint16_t*)x); };
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < panels(columns) * kPanel; c += kLanes)
      store(to.at(r / 2) + c, (Vec)(half(from.at(r) + c / 2) | half(from.at(r + 1) + c / 2) << 16));
  return to;
}

// The transpose of packed (rows, columns) in panels of kPanel rows: to[panel][column][row % kPanel]. Rows up to the
// end of the last panel must be there.
void transpose_panels(Packed from, int64_t rows, int64_t columns, float* to) {
  const int64_t width = panels(columns) * kPanel;
  for (int64_t r = 0; r < panels(rows) * kPanel; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vec block[kLanes];
      for (int k = 0; k < kLanes; ++k) block[k] = load(from.at(r + k) + c);
      transpose(block);
      float* panel = to + r / kPanel * kPanel * width + r % kPanel;
      for (int k = 0; k < kLanes; ++k) store(panel + (c + k) * kPanel, block[k]);
    }
}

}  // namespace
