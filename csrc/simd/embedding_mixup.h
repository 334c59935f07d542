// Mixed rows of an embedding table, and their gradient in the table's order. Compiled once per target.
#include "simd/mix.h"

namespace {

template <class T>
void lookup(const EmbeddingMixupTask& task, int64_t begin, int64_t end) {
  const T* table = (const T*)task.table;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = task.order[unit / task.tokens], token = unit % task.tokens;
    const int64_t at = row * task.tokens + token, beside = task.partner[row] * task.tokens + token;
    mix((T*)task.out + at * task.columns, table + task.ids[at] * task.stride, table + task.ids[beside] * task.stride,
        task.weight[row], task.partner_weight[row], task.columns);
  }
}

// Columns of a source's two rows of the incoming gradient.
template <class T>
struct Rows {
  const T *own, *partner;
  Rows(const EmbeddingGradTask& task, int64_t k, int64_t c)
      : own((const T*)task.grad + task.sources[k].row * task.columns + c),
        partner((const T*)task.grad + task.sources[k].partner * task.columns + c) {}
};

// Columns c .. c + kVectors * kLanes of one row of the table's gradient: the sum of its sources, in their order. Rows
// of the incoming gradient come in no order a processor could foresee, so those of the next source are asked for early.
template <int kVectors, class T>
inline void gather(const EmbeddingGradTask& task, int64_t row, int64_t c) {
  Vec sum[kVectors]{};
  for (int64_t k = task.first[row]; k < task.first[row + 1]; ++k) {
    const Rows<T> from(task, k, c), next(task, k + 1, c);
    const Vec a = splat(task.sources[k].weight), b = splat(task.sources[k].partner_weight);
    for (int i = 0; i < kVectors * kLanes; i += kLanes) {
      __builtin_prefetch(next.own + i);
      __builtin_prefetch(next.partner + i);
      sum[i / kLanes] += fma(a, load(from.own + i), b * load(from.partner + i));
    }
  }
  for (int i = 0; i < kVectors; ++i) store((T*)task.out + row * task.columns + c + i * kLanes, sum[i]);
}

template <class T>
inline void gather_tail(const EmbeddingGradTask& task, int64_t row, int64_t c, int64_t n) {
  Vec sum{};
  for (int64_t k = task.first[row]; k < task.first[row + 1]; ++k) {
    const Rows<T> from(task, k, c);
    const Vec a = splat(task.sources[k].weight), b = splat(task.sources[k].partner_weight);
    sum += fma(a, load_tail(from.own, n), b * load_tail(from.partner, n));
  }
  store_tail((T*)task.out + row * task.columns + c, sum, n);
}

template <class T>
void gather_row(const EmbeddingGradTask& task, int64_t row, int64_t begin, int64_t end) {
  constexpr int kVectors = 8;
  int64_t c = begin;
  for (; c + kVectors * kLanes <= end; c += kVectors * kLanes) gather<kVectors, T>(task, row, c);
  for (; c + kLanes <= end; c += kLanes) gather<1, T>(task, row, c);
  if (c < end) gather_tail<T>(task, row, c, end - c);
}

}  // namespace

// Tokens begin..end in the order of the rows.
static void embedding_mixup(const EmbeddingMixupTask& task, int64_t begin, int64_t end) {
  switch (task.dtype) {
    case Dtype::float32:
      return lookup<float>(task, begin, end);
    case Dtype::bfloat16:
      return lookup<BFloat16>(task, begin, end);
    case Dtype::float16:
      return lookup<Half>(task, begin, end);
  }
}

// Columns begin..end of one row of the table's gradient.
static void embedding_mixup_backward(const EmbeddingGradTask& task, int64_t row, int64_t begin, int64_t end) {
  switch (task.dtype) {
    case Dtype::float32:
      return gather_row<float>(task, row, begin, end);
    case Dtype::bfloat16:
      return gather_row<BFloat16>(task, row, begin, end);
    case Dtype::float16:
      return gather_row<Half>(task, row, begin, end);
  }
}
