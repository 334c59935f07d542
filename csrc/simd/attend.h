// What lies between the student's LSTM layers and after them, compiled once per target. Rows are padded to whole
// vectors, with zeros.
#include "simd/panels.h"

namespace {

using runtime::AttendTask;
using runtime::Pooling;

// scores[i][j] = a_i . b_j for up to 4 rows of each, over `vectors` vectors.
void dots(const float* const (&a)[4], const float* const (&b)[4], int64_t vectors, float (&scores)[4][4]) {
  Vec sum[4][4] = {};
  for (int64_t k = 0; k < vectors * kLanes; k += kLanes) {
    const Vec right[4] = {load(b[0] + k), load(b[1] + k), load(b[2] + k), load(b[3] + k)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec left = load(a[i] + k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = fma(left, right[j], sum[i][j]);
    }
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) scores[i][j] = fold_lanes(sum[i][j], [](Vec x, Vec y) { return x + y; })[0];
}

// In place: e^(x - max) / sum.
void softmax(float* x, int64_t n) {
  float most = x[0], sum = 0;
  for (int64_t i = 1; i < n; ++i) most = x[i] > most ? x[i] : most;
  for (int64_t i = 0; i < n; i += kLanes) {
    float lanes[kLanes];
    const int64_t here = n - i < kLanes ? n - i : kLanes;
    std::memcpy(lanes, x + i, here * sizeof(float));
    store(lanes, exp2((load(lanes) - most) * kLog2e));
    std::memcpy(x + i, lanes, here * sizeof(float));
  }
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  for (int64_t i = 0; i < n; ++i) x[i] /= sum;
}

// to[r] = sum of weights[r][j] * rows[j] over C vectors, for R rows of weights.
template <int R, int C>
void weighted_sums(const float* weights, int64_t weight_stride, const float* rows, int64_t stride, int64_t n, float* to,
                   int64_t to_stride) {
  Vec sum[R][C] = {};
  for (int64_t j = 0; j < n; ++j) {
    Vec row[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) row[c] = load(rows + j * stride + c * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec weight = splat(weights[r * weight_stride + j]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = fma(weight, row[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(to + r * to_stride + c * kLanes, sum[r][c]);
}

// The same over all of a row's vectors.
template <int R>
void weighted_sums(const float* weights, int64_t weight_stride, const float* rows, int64_t stride, int64_t n,
                   int64_t vectors, float* to) {
  int64_t v = 0;
  for (; v + 4 <= vectors; v += 4)
    weighted_sums<R, 4>(weights, weight_stride, rows + v * kLanes, stride, n, to + v * kLanes, vectors * kLanes);
  for (; v < vectors; ++v)
    weighted_sums<R, 1>(weights, weight_stride, rows + v * kLanes, stride, n, to + v * kLanes, vectors * kLanes);
}

// to = [s, s - c, s * c], in this order, since the padding of one part is overwritten by the next.
void join(const float* s, const float* c, int64_t width, float* to) {
  const auto each = [&](auto f) {
    for (int64_t k = 0; k < width; k += kLanes) store(to + k, f(load(s + k), load(c + k)));
    to += width;
  };
  each([](Vec a, Vec) { return a; });
  each([](Vec a, Vec b) { return a - b; });
  each([](Vec a, Vec b) { return a * b; });
}

}  // namespace

// mixed[i] = [s, s - c, s * c] of every row s, c being what s attends to among the others.
static void attend(const AttendTask& task) {
  const int64_t vectors = padded(task.width) / kLanes, row_scores = padded(task.other_rows);
  float *scores = task.memory, *context = scores + 4 * row_scores, *row = context + 4 * vectors * kLanes;
  const auto four = [&](const float* base, int64_t first, int64_t count, const float*(&rows)[4]) {
    for (int r = 0; r < 4; ++r) rows[r] = base + (first + r < count ? first + r : count - 1) * task.stride;
  };
  for (int64_t i = 0; i < task.rows; i += 4) {
    const float *left[4], *right[4];
    four(task.states, i, task.rows, left);
    for (int64_t j = 0; j < task.other_rows; j += 4) {
      four(task.others, j, task.other_rows, right);
      float block[4][4];
      dots(left, right, vectors, block);
      for (int a = 0; a < 4; ++a)
        for (int b = 0; b < 4 && j + b < task.other_rows; ++b) scores[a * row_scores + j + b] = block[a][b];
    }
    for (int a = 0; a < 4; ++a) softmax(scores + a * row_scores, task.other_rows);
    weighted_sums<4>(scores, row_scores, task.others, task.stride, task.other_rows, vectors, context);
    for (int a = 0; a < 4 && i + a < task.rows; ++a) {
      const bool bytes = task.scale != nullptr;
      join(left[a], context + a * vectors * kLanes, task.width,
           bytes ? row : (float*)task.mixed + (i + a) * task.mixed_stride);
      if (bytes) task.scale[i + a] = quantize(row, 3 * task.width, (uint8_t*)task.mixed + (i + a) * task.mixed_stride);
    }
  }
}

// to (kinds * width) = the poolings of n rows one after the other; at `to` there is room for a vector more.
static void pool(const float* states, int64_t n, int64_t stride, int64_t width, const std::vector<Pooling>& kinds,
                 const float* scorer, float* to, float* memory) {
  const int64_t vectors = padded(width) / kLanes;
  for (const Pooling kind : kinds) {
    if (kind == Pooling::attention) {
      for (int64_t i = 0; i < n; ++i) {
        Vec sum{};
        for (int64_t k = 0; k < vectors * kLanes; k += kLanes)
          sum = fma(load(states + i * stride + k), load(scorer + k), sum);
        memory[i] = fold_lanes(sum, [](Vec a, Vec b) { return a + b; })[0];
      }
      softmax(memory, n);
      weighted_sums<1>(memory, n, states, stride, n, vectors, to);
    } else {
      for (int64_t k = 0; k < vectors * kLanes; k += kLanes) {
        Vec v = load(states + k);
        for (int64_t i = 1; i < n; ++i) {
          const Vec next = load(states + i * stride + k);
          v = kind == Pooling::max ? max(v, next) : kind == Pooling::min ? min(v, next) : v + next;
        }
        store(to + k, kind == Pooling::mean ? v * (1.0f / n) : v);
      }
    }
    to += width;
  }
}

// to (rows, columns of w) = W x + b, from 0 up where `rectify`. memory holds the rows' bytes and scales.
static void linear(const Panels& w, const float* x, int64_t rows, int64_t stride, bool vnni, bool rectify, float* to,
                   char* memory) {
  const auto put = [&](int64_t row, int64_t panel, const Vec(&y)[kGroups]) {
    for (int g = 0; g < kGroups; ++g)
      store(to + row * w.columns() + panel * kPanel + g * kLanes, rectify ? max(Vec{}, y[g]) : y[g]);
  };
  if (w.precision != Precision::int8) return multiply<Precision::float32, false>(w, {x, rows, stride, nullptr}, put);
  float* scale = (float*)memory;
  uint8_t* bytes = (uint8_t*)(scale + rows);
  const int64_t inputs = w.depth() * 4;
  for (int64_t r = 0; r < rows; ++r) scale[r] = quantize(x + r * stride, w.inputs, bytes + r * inputs);
  if constexpr (kCanVnni)
    if (vnni) return multiply<Precision::int8, true>(w, {bytes, rows, inputs, scale}, put);
  multiply<Precision::int8, false>(w, {bytes, rows, inputs, scale}, put);
}
