// Rows of one head of a (batch, heads, tokens, dim) tensor, and what all passes over scores need.
namespace {

constexpr float kLowest = -1e30f;

inline Vec sum_of(Vec a, Vec b) { return a + b; }
inline Vec max_of(Vec a, Vec b) { return max(a, b); }

template <class T>
T* row_of(const Heads& x, int64_t b, int64_t h, int64_t i) {
  return (T*)x.data + b * x.batch + h * x.head + i * x.token;
}

template <class T>
void put_row(T* to, const float* from, int64_t n) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(to + j, load(from + j));
  if (j < n) store_tail(to + j, load(from + j), n - j);
}

// Token i of a head = column i of packed (dim, tokens).
template <class T>
void put_columns(const Heads& x, int64_t b, int64_t h, Packed from, int64_t tokens, int64_t dim) {
  for (int64_t i = 0; i < tokens; i += kLanes)
    for (int64_t c = 0; c < dim; c += kLanes) {
      float rows[kLanes * kLanes];
      transpose({from.at(c) + i, from.row}, kLanes, kLanes, {rows, kLanes});
      for (int64_t k = 0; k < std::min<int64_t>(kLanes, tokens - i); ++k)
        put_row(row_of<T>(x, b, h, i + k) + c, rows + k * kLanes, std::min<int64_t>(kLanes, dim - c));
    }
}

}  // namespace
