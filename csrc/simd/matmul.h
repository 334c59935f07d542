// A register-tiled matrix product for operands that are packed once and used many times, compiled once per target.
//
// The left operand is read one element at a time by any two strides, so that it may be a transpose; the right one is
// packed in rows whose width is a multiple of kPanel.
namespace {

#if FASTKD_LANES == 16
constexpr int kStrip = 8;
#else
constexpr int kStrip = 4;
#endif
constexpr int kPanel = 2 * kLanes;

struct Left {
  const float* data;
  int64_t row, depth;  // strides
};
struct Packed {
  float* data;
  int64_t row;  // stride
};

// c (M, kPanel) = or += a (M, depth) · b (depth, kPanel).
template <int M>
void product_tile(Left a, Packed b, int64_t depth, Packed c, bool accumulate) {
  Vec sum[M][2] = {};
  if (accumulate)
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < 2; ++v) sum[i][v] = load(c.data + i * c.row + v * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    const Vec first = load(b.data + k * b.row), second = load(b.data + k * b.row + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec x = splat(a.data[i * a.row + k * a.depth]);
      sum[i][0] = fma(x, first, sum[i][0]);
      sum[i][1] = fma(x, second, sum[i][1]);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < 2; ++v) store(c.data + i * c.row + v * kLanes, sum[i][v]);
}

template <int M>
void product_rest(int64_t rows, Left a, Packed b, int64_t depth, Packed c, bool accumulate) {
  if (rows == M) return product_tile<M>(a, b, depth, c, accumulate);
  if constexpr (M > 1) product_rest<M - 1>(rows, a, b, depth, c, accumulate);
}

// c (rows, kPanel) = or += a (rows, depth) · b (depth, kPanel).
void product(int64_t rows, Left a, Packed b, int64_t depth, Packed c, bool accumulate) {
  int64_t i = 0;
  for (; i + kStrip <= rows; i += kStrip) {
    product_tile<kStrip>({a.data + i * a.row, a.row, a.depth}, b, depth, {c.data + i * c.row, c.row}, accumulate);
  }
  if (i < rows)
    product_rest<kStrip - 1>(rows - i, {a.data + i * a.row, a.row, a.depth}, b, depth, {c.data + i * c.row, c.row},
                             accumulate);
}

inline int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

// Floats from one row of a packed matrix to the next: an odd number of cache lines, so that rows fall into all sets.
inline int64_t packed_stride(int64_t columns) { return panels(columns) * kPanel + 16; }

// A row in float32, zeros up to the end of its last panel.
template <class T>
void pack_row(const T* from, int64_t n, float* to) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(to + j, load(from + j));
  for (; j < n; ++j) to[j] = to_float(from[j]);
  for (; j < panels(n) * kPanel; ++j) to[j] = 0.0f;
}

inline void zero_row(int64_t n, float* to) { std::memset(to, 0, panels(n) * kPanel * sizeof(float)); }

// The transpose of packed (rows, columns) in panels of kPanel rows: to[panel][column][row % kPanel]. Rows up to the
// end of the last panel must be there.
void transpose_panels(Packed from, int64_t rows, int64_t columns, float* to) {
  const int64_t width = panels(columns) * kPanel;
  for (int64_t r = 0; r < panels(rows) * kPanel; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vec block[kLanes];
      for (int k = 0; k < kLanes; ++k) block[k] = load(from.data + (r + k) * from.row + c);
      transpose(block);
      float* panel = to + r / kPanel * kPanel * width + r % kPanel;
      for (int k = 0; k < kLanes; ++k) store(panel + (c + k) * kPanel, block[k]);
    }
}

}  // namespace
