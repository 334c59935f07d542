// Attention and its gradient, one key head at a time, compiled once per target.
//
// For a block of query rows the tiles of scores live in the L2 cache: they become exponentials and, in the gradient,
// are made anew from the logarithms of their sums. A thread owns its key head, so that no two ever add to one gradient.
#include "simd/matmul.h"
//
#include "simd/heads.h"

namespace {

// -inf where the mask is false, of which n keys are there.
inline Vec masked(Vec x, const bool* mask, int64_t n) {
#if defined(FASTKD_AVX512)
  const __m128i seen = _mm_maskz_loadu_epi8(n < kLanes ? (1u << n) - 1 : 0xffff, mask);
  return (Vec)_mm512_mask_mov_ps((__m512)splat(-kInfinity), _mm_test_epi8_mask(seen, seen), (__m512)x);
#else
  VecInt seen{};
  for (int k = 0; k < (n < kLanes ? (int)n : kLanes); ++k) seen[k] = mask[k];
  return select(seen != 0, x, splat(-kInfinity));
#endif
}

// T is the type of the tensors, Unit that of the packed operands.
template <class T, class Unit>
class AttentionHead {
 public:
  AttentionHead(const AttentionTask& task, float* scratch)
      : task(task), dim(task.dim), all_keys(panels(task.keys) * kPanel), rows(block_rows(task)), memory(scratch) {
    const int64_t all_rows = panels(rows) * kPanel;
    for (Packed* of_keys : {&keys, &values, &key_panels, &value_panels, &paired_keys}) *of_keys = take(all_keys, dim);
    for (Packed* of_rows : {&queries, &outputs, &paired_rows}) *of_rows = take(all_rows, dim);
    for (Packed* turned : {&turned_queries, &turned_outputs}) *turned = take(panels(dim) * kPanel, rows);
    for (Packed* grads : {&grad_keys, &grad_values}) *grads = take(panels(dim) * kPanel, task.keys);
    for (Packed* tile : {&scores, &of_maps, &maps}) *tile = take(all_rows, task.keys);
  }

  void forward(int64_t b, int64_t key_head) {
    pack_keys(b, key_head);
    right = along_rows<Unit>(values, all_keys, dim, paired_keys);
    each_block(key_head, [&](int64_t head, int64_t first, int64_t count) { forward_block(head, first, count); });
  }

  void backward(int64_t b, int64_t key_head) {
    pack_keys(b, key_head);
    transpose_panels(values, task.keys, units<Unit>(dim), value_panels.data);
    right = along_rows<Unit>(keys, all_keys, dim, paired_keys);
    for (const Packed& grads : {grad_keys, grad_values}) std::memset(grads.data, 0, dim * grads.row * sizeof(float));
    each_block(key_head, [&](int64_t head, int64_t first, int64_t count) { backward_block(head, first, count); });
    put_columns<T>(task.grad_key, batch, key_head, grad_keys, task.keys, dim);
    put_columns<T>(task.grad_value, batch, key_head, grad_values, task.keys, dim);
  }

 private:
  Packed take(int64_t n, int64_t columns) {
    const Packed taken = {memory, packed_stride(columns)};
    memory += n * taken.row;
    return taken;
  }

  template <class F>
  void each_block(int64_t key_head, F f) {
    const int64_t group = task.heads / task.key_heads;
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
      for (int64_t i = 0; i < task.queries; i += rows) f(head, i, std::min(rows, task.queries - i));
  }

  void pack(const Heads& from, int64_t head, int64_t first, int64_t count, Packed to) const {
    for (int64_t i = 0; i < count; ++i) pack_row<Unit>(row_of<T>(from, batch, head, first + i), dim, to.at(i));
  }

  void pack_keys(int64_t b, int64_t key_head) {
    batch = b;
    pack(task.key, key_head, 0, task.keys, keys);
    pack(task.value, key_head, 0, task.keys, values);
    for (int64_t j = task.keys; j < all_keys; ++j) zero_row(dim, keys.at(j)), zero_row(dim, values.at(j));
    transpose_panels(keys, task.keys, units<Unit>(dim), key_panels.data);
  }

  int64_t seen_by(int64_t query) const { return task.causal ? query + 1 : task.keys; }

  // Keys that a block sees, in whole panels.
  int64_t width_of(int64_t first, int64_t count) const { return panels(seen_by(first + count - 1)) * kPanel; }

  // tile = rows of `left` times the transpose that lies in panels.
  void multiply(Packed left, int64_t count, Packed transposed, int64_t width, Packed tile) const {
    const int64_t panel = panels(units<Unit>(dim)) * kPanel;
    for (int64_t j = 0; j < width; j += kPanel)
      product<Unit>(count, left, {transposed.data + j * panel, kPanel}, units<Unit>(dim), {tile.data + j, tile.row},
                    false);
  }

  // Scores j .. j + kLanes of a query, scaled, -inf where it sees no key.
  Vec seen(const float* row, int64_t head, int64_t query, int64_t j) const {
    const int64_t left = seen_by(query) - j;
    Vec x = load(row + j) * task.scale;
    if (task.mask)
      x = masked(x, task.mask + batch * task.mask_batch + head * task.mask_head + query * task.mask_query + j, left);
    return left < kLanes ? select(iota() < splat((float)left), x, splat(-kInfinity)) : x;
  }

  float* lse_of(int64_t head, int64_t query) const {
    return task.lse + (batch * task.heads + head) * task.queries + query;
  }

  void forward_block(int64_t head, int64_t first, int64_t count) {
    const int64_t width = width_of(first, count);
    pack(task.query, head, first, count, queries);
    multiply(queries, count, key_panels, width, scores);
    float inverse[kMostRows];
    for (int64_t r = 0; r < count; r += kLanes)
      normalise(head, first, r, std::min<int64_t>(kLanes, count - r), width, inverse + r);
    for (int64_t c = 0; c < dim; c += kPanel)
      product<Unit>(count, scores, {right.data + c, right.row}, units<Unit>(width), {outputs.data + c, outputs.row},
                    false);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < dim; c += kLanes) store(outputs.at(i) + c, load(outputs.at(i) + c) * inverse[i]);
      put_row(row_of<T>(task.output, batch, head, first + i), outputs.at(i), dim);
    }
  }

  // Scores of rows r .. r + count become exponentials; at most kLanes, so that their folds are taken together.
  void normalise(int64_t head, int64_t first, int64_t r, int64_t count, int64_t width, float* inverse) {
    Vec top[kLanes] = {}, sum[kLanes] = {};
    for (int k = 0; k < count; ++k) {
      float* row = scores.at(r + k);
      top[k] = splat(kLowest);
      for (int64_t j = 0; j < seen_by(first + r + k); j += kLanes) {
        const Vec x = seen(row, head, first + r + k, j);
        store(row + j, x);
        top[k] = max(x, top[k]);
      }
    }
    const Vec most = fold_rows(top, max_of);
    for (int k = 0; k < count; ++k) {
      float* row = scores.at(r + k);
      const float above = most[k];
      Singles::Sum all{};
      int64_t j = 0;
      for (; j < seen_by(first + r + k); j += kLanes) {
        const Vec e = exp2((load(row + j) - above) * kLog2e);
        all += __builtin_convertvector(e, Singles::Sum);
        put<Unit>(row, j, e);
      }
      for (; j < width; j += kLanes) put<Unit>(row, j, Vec{});
      sum[k] = __builtin_convertvector(all, Vec);
    }
    const Vec total = fold_rows(sum, sum_of);
    const VecInt none = total == 0.0f;
    const Vec lse = select(none, splat(kInfinity), most + log(total)), by = select(none, Vec{}, 1.0f / total);
    std::memcpy(lse_of(head, first + r), &lse, count * sizeof(float));
    std::memcpy(inverse, &by, count * sizeof(float));
  }

  void backward_block(int64_t head, int64_t first, int64_t count) {
    const int64_t width = width_of(first, count), depth = units<Unit>(count);
    pack(task.query, head, first, count, queries);
    pack(task.grad_output, head, first, count, outputs);
    multiply(queries, count, key_panels, width, scores);
    multiply(outputs, count, value_panels, width, of_maps);
    for (int64_t r = 0; r < count; ++r) differentiate(head, first, r, width);

    turn<Unit>(queries, count, dim, paired_rows, turned_queries);
    turn<Unit>(outputs, count, dim, paired_rows, turned_outputs);
    const Packed of_scores = across<Unit>(Unit::kPer == 1 ? scores : of_maps, count, width);
    const Packed right_maps = across<Unit>(maps, count, width);
    for (int64_t j = 0; j < width; j += kPanel) {
      product<Unit>(dim, turned_queries, {of_scores.data + j, of_scores.row}, depth,
                    {grad_keys.data + j, grad_keys.row}, true);
      product<Unit>(dim, turned_outputs, {right_maps.data + j, right_maps.row}, depth,
                    {grad_values.data + j, grad_values.row}, true);
    }
    // The packed queries have served, and their memory holds the gradient.
    for (int64_t c = 0; c < dim; c += kPanel)
      product<Unit>(count, scores, {right.data + c, right.row}, units<Unit>(width), {queries.data + c, queries.row},
                    false);
    for (int64_t i = 0; i < count; ++i) put_row(row_of<T>(task.grad_query, batch, head, first + i), queries.at(i), dim);
  }

  // A row of scores becomes their gradient, for products along it in its own tile, and for products across the rows, if
  // that is another, in place of the maps' gradient. The map itself lies in the third tile.
  void differentiate(int64_t head, int64_t first, int64_t r, int64_t width) {
    const float lse = *lse_of(head, first + r);
    float *row = scores.at(r), *of_map = of_maps.at(r);
    Vec total{}, sum{};
    for (int64_t j = 0; j < seen_by(first + r); j += kLanes) {
      const Vec e = exp2((seen(row, head, first + r, j) - lse) * kLog2e);
      store(row + j, e);
      total += e;
      sum = fma(e, load(of_map + j), sum);
    }
    total = fold_lanes(total, sum_of);  // near 1, but for the rounding of large scores
    const Vec by = select(total == 0.0f, Vec{}, 1.0f / total), mean = fold_lanes(sum, sum_of) * by;
    for (int64_t j = 0; j < width; j += kLanes) {
      const Vec map = j < seen_by(first + r) ? load(row + j) * by : Vec{};
      const Vec gradient = map * (load(of_map + j) - mean) * task.scale;
      put<Unit>(row, j, gradient);
      if (Unit::kPer == 2) put_across<Unit>(of_maps, r, j, gradient);
      put_across<Unit>(maps, r, j, map);
    }
  }

  const AttentionTask& task;
  const int64_t dim, all_keys, rows;
  float* memory;
  Packed keys, values, key_panels, value_panels, paired_keys, grad_keys, grad_values;
  Packed queries, outputs, paired_rows, turned_queries, turned_outputs;
  Packed scores, of_maps, maps;
  Packed right{};  // operand of the last product of a block
  int64_t batch = 0;
};

template <class T, class Unit>
void key_heads(const AttentionTask& task, bool backward, int64_t begin, int64_t end, float* scratch) {
  AttentionHead<T, Unit> head(task, scratch);
  for (int64_t k = begin; k < end; ++k) {
    const int64_t batch = k / task.key_heads, key_head = k % task.key_heads;
    backward ? head.backward(batch, key_head) : head.forward(batch, key_head);
  }
}

}  // namespace

// Units begin..end of (batch, key heads).
static void attention(const AttentionTask& task, bool backward, int64_t begin, int64_t end, float* scratch) {
  switch (task.dtype) {
    case Dtype::float32:
      return key_heads<float, Singles>(task, backward, begin, end, scratch);
    case Dtype::bfloat16:
#if defined(FASTKD_AVX512)
      if (has_bfloat16_tiles()) {
        const TileScope tiles;
        return key_heads<BFloat16, Tiles>(task, backward, begin, end, scratch);
      }
      if (has_bfloat16_pairs()) return key_heads<BFloat16, Pairs>(task, backward, begin, end, scratch);
#endif
      return key_heads<BFloat16, Singles>(task, backward, begin, end, scratch);
    case Dtype::float16:
      return key_heads<Half, Singles>(task, backward, begin, end, scratch);
  }
}
