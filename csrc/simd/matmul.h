// Register-tiled matrix products of operands that are packed once and used many times, compiled once per target.
//
// Operands are made of units of 32 bits: Singles are floats, Pairs two bfloat16 that are neighbours along the depth, so
// that the depth of a product in units is half, and Tiles pairs of which whole tiles are multiplied at a time. The left
// operand's rows lie along the depth; the right one's lie across it, and their width is a multiple of kPanel. The
// result is float32. There is memory for rows up to a multiple of 16, and up to one of kLanes zeros along the depth.
#if defined(FASTKD_AVX512)
#include "simd/amx.h"
#endif

namespace {

#if FASTKD_LANES == 16
constexpr int kStrip = 8;
#else
constexpr int kStrip = 4;
#endif
constexpr int kPanel = 2 * kLanes;
// Units that are summed by themselves: the error of a sum grows with its length, and so many rows fit the L1 cache.
constexpr int64_t kDepth = 64;

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
  static VecHalf rounded(Vec x) {
    VecHalf bits;
    asm("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(x));
    return bits;
  }
};

struct Tiles : Pairs {};
#endif

inline int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

template <class Unit>
int64_t units(int64_t n) {
  return (n + Unit::kPer - 1) / Unit::kPer;
}

// c (M, kPanel) = or += a (M, depth) · b (depth, kPanel).
template <class Unit, int M>
void product_tile(Packed a, Packed b, int64_t depth, Packed c, bool accumulate) {
  typename Unit::Sum sum[M][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec first = load(b.at(k)), second = load(b.at(k) + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec x = splat(a.at(i)[k]);
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
void product_rest(int64_t rows, Packed a, Packed b, int64_t depth, Packed c, bool accumulate) {
  if (rows == M) return product_tile<Unit, M>(a, b, depth, c, accumulate);
  if constexpr (M > 1) product_rest<Unit, M - 1>(rows, a, b, depth, c, accumulate);
}

template <class Unit>
void product_part(int64_t rows, Packed a, Packed b, int64_t depth, Packed c, bool accumulate) {
  int64_t i = 0;
#if defined(FASTKD_AVX512)
  if constexpr (std::is_same<Unit, Tiles>::value) {
    for (; i + kTile < rows; i += 2 * kTile)
      tile_product<true>(a.at(i), a.row, b.data, b.row, depth, c.at(i), c.row, accumulate);
    if (i < rows) tile_product<false>(a.at(i), a.row, b.data, b.row, depth, c.at(i), c.row, accumulate);
    return;
  }
#endif
  for (; i + kStrip <= rows; i += kStrip)
    product_tile<Unit, kStrip>({a.at(i), a.row}, b, depth, {c.at(i), c.row}, accumulate);
  if (i < rows) product_rest<Unit, kStrip - 1>(rows - i, {a.at(i), a.row}, b, depth, {c.at(i), c.row}, accumulate);
}

// c (rows, kPanel) = or += a (rows, depth) · b (depth, kPanel), in parts of the depth.
template <class Unit>
void product(int64_t rows, Packed a, Packed b, int64_t depth, Packed c, bool accumulate) {
  for (int64_t k = 0; k < depth; k += kDepth)
    product_part<Unit>(rows, {a.data + k, a.row}, {b.at(k), b.row}, std::min(kDepth, depth - k), c,
                       accumulate || k > 0);
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

// x as units j.. of a row; in place of floats it leaves those of later lanes alone.
template <class Unit>
void put(float* row, int64_t j, Vec x) {
  if constexpr (Unit::kPer == 1) {
    store(row + j, x);
  } else {
    const VecHalf bits = Unit::rounded(x);
    std::memcpy((uint16_t*)row + j, &bits, sizeof bits);
  }
}

// x as what row r gives to units across the rows of a tile: pairs lie in each second row.
template <class Unit>
void put_across(Packed tile, int64_t r, int64_t j, Vec x) {
  if constexpr (Unit::kPer == 1) {
    store(tile.at(r) + j, x);
  } else {
    const VecBits bits = __builtin_convertvector(Unit::rounded(x), VecBits);
    float* pair = tile.at(r - r % 2) + j;
    store(pair, (Vec)(r % 2 ? (VecBits)load(pair) | bits << 16 : bits));
  }
}

// The right operand whose depth are the rows of a tile that ``put_across`` filled; zeros follow the last row.
template <class Unit>
Packed across(Packed tile, int64_t rows, int64_t columns) {
  if constexpr (Unit::kPer == 1) return tile;
  const Packed pairs = {tile.data, 2 * tile.row};
  for (int64_t r = units<Unit>(rows); r % kLanes; ++r) zero_row(columns, pairs.at(r));
  return pairs;
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

// to[c] = column c of rows, both of floats or of units; rows and columns in whole vectors.
inline void transpose(Packed from, int64_t rows, int64_t columns, Packed to) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vec block[kLanes];
      for (int k = 0; k < kLanes; ++k) block[k] = load(from.at(r + k) + c);
      transpose(block);
      for (int k = 0; k < kLanes; ++k) store(to.at(c + k) + r, block[k]);
    }
}

// Packed rows as the left operand of a product whose depth they are.
template <class Unit>
void turn(Packed rows, int64_t count, int64_t columns, Packed memory, Packed to) {
  const int64_t depth = padded(units<Unit>(count));
  for (int64_t i = count; i < depth * Unit::kPer; ++i) zero_row(columns, rows.at(i));
  transpose(along_rows<Unit>(rows, depth * Unit::kPer, columns, memory), depth, columns, to);
}

// The transpose of packed (rows, columns) in panels of kPanel rows: to[panel][column][row % kPanel]. Rows up to the
// end of the last panel must be there.
void transpose_panels(Packed from, int64_t rows, int64_t columns, float* to) {
  const int64_t width = panels(columns) * kPanel;
  for (int64_t r = 0; r < panels(rows) * kPanel; r += kPanel)
    transpose({from.at(r), from.row}, kPanel, columns, {to + r * width, kPanel});
}

}  // namespace
