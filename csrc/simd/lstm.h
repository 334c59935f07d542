// One direction of an LSTM layer over sequences of any lengths, compiled once per target.
//
// Sequences come longest first, so that those still running at a step are the first few: nothing is padded. The input's
// part of the gates is computed for as many steps as fit the cache, then the steps follow one another.
#include "simd/gates.h"
#include "simd/panels.h"

namespace {

using runtime::LstmTask;
using runtime::TanhTable;

// values[index % 16]
inline Vec look_up(const float* values, VecInt index) {
#if defined(FASTKD_AVX512)
  return (Vec)_mm512_maskz_permutexvar_ps(-1, (__m512i)index, _mm512_load_ps(values));
#elif defined(FASTKD_AVX2)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(values), (__m256i)index),
               high = _mm256_permutevar8x32_ps(_mm256_load_ps(values + 8), (__m256i)index);
  return (Vec)_mm256_blendv_ps(low, high, (__m256)(index << 28));  // by the index's bit of 8
#else
  Vec v;
  for (int k = 0; k < kLanes; ++k) v[k] = values[index[k] & 15];
  return v;
#endif
}

inline Vec tanh(const TanhTable& table, Vec x) {
  const VecInt sign = as_int(x) & (int32_t)0x80000000u;
  const Vec size = min(splat(15.49f * TanhTable::kWidth), as_float(as_int(x) ^ sign));
  const VecInt segment = as_int(fma(size, splat(1 / TanhTable::kWidth), splat(12582912.0f)));  // in its low bits
  const Vec p = fma(look_up(table.square, segment), size, look_up(table.linear, segment));
  return as_float(as_int(fma(p, size, look_up(table.constant, segment))) | sign);
}

// As below from gates of which the sigmoids' come halved, since sigmoid(x) = (1 + tanh(x / 2)) / 2. Error below 1e-3.
inline Vec update_roughly(const TanhTable& table, const Vec (&gates)[kGroups], float* c) {
  const auto sigmoid = [&](Vec half) { return fma(tanh(table, half), splat(0.5f), splat(0.5f)); };
  const Vec state = fma(sigmoid(gates[1]), load(c), sigmoid(gates[0]) * tanh(table, gates[2]));
  store(c, state);
  return sigmoid(gates[3]) * tanh(table, state);
}

// New hidden state from the gates before their non-linearities; the cell state is at c. Error below 2e-6.
inline Vec update(const Vec (&gates)[kGroups], float* c) {
  const Vec one = splat(1.0f), input = power(-1, gates[0]), forget = power(-1, gates[1]), cell = power(-2, gates[2]),
            output = power(-1, gates[3]);
  const Vec fresh = (one - cell) * reciprocal((one + input) * (one + cell));  // sigmoid times tanh, one division
  const Vec state = fma(load(c), reciprocal(one + forget), fresh);
  store(c, state);
  const Vec squashed = power(-2, state);
  return (one - squashed) * reciprocal((one + output) * (one + squashed));
}

template <Precision P, bool kVnni>
class Direction {
  using Input = typename Tile<P, kVnni, 1, 1>::Input;
  static constexpr bool kInteger = P == Precision::int8;
  static constexpr int64_t kChunk = 96;  // rows whose gates stay in L2

  const LstmTask& task;
  const runtime::Direction& layer;
  const TanhTable& table = runtime::tanh_table();
  const int64_t units, input_stride;
  float *gates, *scale, *cell;
  Input *input, *hidden, *next_hidden;

 public:
  Direction(const LstmTask& task, char* memory)
      : task(task),
        layer(*task.layer),
        units(layer.recurrent.panels * kLanes),
        input_stride(layer.input.depth() * kInputs) {
    const int64_t rows = chunk_rows(task.sequences);
    const auto take = [&](auto*& p, int64_t n) {
      p = (std::remove_reference_t<decltype(p)>)memory;
      memory += (n * sizeof(*p) + 63) / 64 * 64;
    };
    take(gates, rows * 4 * units);
    take(scale, rows);
    take(cell, task.sequences * units);
    take(input, rows * input_stride);
    take(hidden, task.sequences * units);
    take(next_hidden, task.sequences * units);
    std::memset(cell, 0, task.sequences * units * sizeof(float));
    std::memset(hidden, kInteger ? 128 : 0, task.sequences * units * sizeof(Input));
  }

  static int64_t chunk_rows(int64_t sequences) { return sequences > kChunk ? sequences : kChunk; }
  static int64_t bytes(const LstmTask& task) {
    const int64_t units = task.layer->recurrent.panels * kLanes, rows = chunk_rows(task.sequences);
    const int64_t inputs = task.layer->input.depth() * kInputs;
    return rows * (4 * units + inputs + 1) * 4 + task.sequences * units * 12 + 6 * 64;
  }

  void run() {
    const int64_t steps = task.sequences > 0 ? task.length[0] : 0;
    int64_t active = task.sequences, last = active;
    const auto active_at = [&](int64_t step, int64_t from) {
      while (from > 0 && task.length[from - 1] <= step) --from;
      return from;
    };
    for (int64_t begin = 0, end; begin < steps; begin = end) {
      int64_t rows = 0;
      for (end = begin; end < steps; ++end) {
        const int64_t n = active_at(end, last);
        if (rows > 0 && rows + n > kChunk) break;
        gather(end, n, rows);
        rows += n;
        last = n;
      }
      project(rows);
      for (int64_t step = begin, row = 0; step < end; ++step) {
        active = active_at(step, active);
        advance(step, active, row, rows);
        row += active;
      }
    }
  }

 private:
  static constexpr int64_t kInputs = kInteger ? 4 : 1;  // per step of a product

  int64_t token(int64_t sequence, int64_t step) const {
    return task.begin[sequence] + (layer.backward ? task.length[sequence] - 1 - step : step);
  }

  void gather(int64_t step, int64_t n, int64_t row) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t from = task.x.row(token(i, step));
      Input* to = input + (row + i) * input_stride;
      if constexpr (!kInteger) {
        std::memcpy(to, task.x.values + from * task.x.stride, layer.input.inputs * sizeof(float));
      } else if (task.x.bytes != nullptr) {
        std::memcpy(to, task.x.bytes + from * task.x.stride, input_stride);
        scale[row + i] = task.x.scale[from];
      } else {
        scale[row + i] = quantize(task.x.values + from * task.x.stride, layer.input.inputs, to);
      }
    }
  }

  // Gates of a chunk lie [panel][row][gate][lane]: rows of all panels together would fall into one set of the cache.
  float* gates_at(int64_t panel, int64_t row, int64_t rows) { return gates + (panel * rows + row) * kPanel; }

  void project(int64_t rows) {
    multiply<kInteger ? P : Precision::float32, kVnni>(layer.input, {input, rows, input_stride, scale},
                                                       [&](int64_t row, int64_t panel, const Vec(&y)[kGroups]) {
                                                         for (int g = 0; g < kGroups; ++g)
                                                           store(gates_at(panel, row, rows) + g * kLanes, y[g]);
                                                       });
  }

  // One time step of the first n sequences, whose gates begin at `row` of the chunk's `rows`.
  void advance(int64_t step, int64_t n, int64_t row, int64_t rows) {
    constexpr int kMost = kTileRows<P, kVnni>;
    const Panels& w = layer.recurrent;
    for (int64_t done = 0, at_once; done < w.panels; done += at_once) {
      at_once = panels_at_once(n, w.panels - done);
      // To and fro: the panels that were read last are the ones that a cache still has.
      const int64_t panel = step % 2 == 0 ? done : w.panels - done - at_once;
      for (int64_t first = 0, count; first < n; first += count) {
        count = tile_rows<kMost>(n - first);
        if (at_once == 2)
          tile<1, 2>(step, panel, first, row, rows);
        else
          with_rows<kMost>(count, [&](auto R) { tile<R, 1>(step, panel, first, row, rows); });
      }
    }
    std::swap(hidden, next_hidden);
  }

  template <int R, int B>
  void tile(int64_t step, int64_t panel, int64_t first, int64_t row, int64_t rows) {
    const auto gates_of = [&](int b, int r, int g) {
      return load(gates_at(panel + b, row + first + r, rows) + g * kLanes);
    };
    Tile<P, kVnni, R, B> t(layer.recurrent, panel);
    if constexpr (!kInteger) each<B, R>([&](int b, int r, int g) { t.sum[b][r][g] = gates_of(b, r, g); });
    t.add(layer.recurrent, panel, hidden + first * units, units);
    Vec sums[B][R][kGroups];
    each<B, R>([&](int b, int r, int g) {
      if constexpr (kInteger) {
        const Vec scale = load(layer.recurrent.scale.data() + (panel + b) * kPanel + g * kLanes);
        sums[b][r][g] = fma(to_vec(t.sum[b][r][g]), scale, gates_of(b, r, g));
      } else {
        sums[b][r][g] = t.sum[b][r][g];
      }
    });
    for (int b = 0; b < B; ++b)
      for (int r = 0; r < R; ++r) finish(step, (panel + b) * kLanes, first + r, sums[b][r]);
  }

  void finish(int64_t step, int64_t unit, int64_t sequence, const Vec (&gates)[kGroups]) {
    float* c = cell + sequence * units + unit;
    const Vec h = kInteger ? update_roughly(table, gates, c) : update(gates, c);
    Input* to = next_hidden + sequence * units + unit;
    if constexpr (kInteger)
      store_bytes(to, to_byte(h), kLanes);
    else
      store(to, h);
    float* y = task.y + token(sequence, step) * task.y_stride + unit;
    const int64_t left = layer.hidden - unit;
    if (left >= kLanes)
      store(y, h);
    else if (left > 0)
      store_tail(y, h, left);
  }
};

template <Precision P, bool kVnni>
int64_t run_direction(const LstmTask& task, char* memory) {
  if (memory != nullptr) Direction<P, kVnni>(task, memory).run();
  return Direction<P, kVnni>::bytes(task);
}

}  // namespace

// Bytes of memory that the task needs; runs it where memory is given.
static int64_t lstm(const LstmTask& task, bool vnni, char* memory) {
  switch (task.layer->recurrent.precision) {
    case Precision::float32:
      return run_direction<Precision::float32, false>(task, memory);
    case Precision::bfloat16:
      return run_direction<Precision::bfloat16, false>(task, memory);
    case Precision::int8:
      if constexpr (kCanVnni)
        if (vnni) return run_direction<Precision::int8, true>(task, memory);
      return run_direction<Precision::int8, false>(task, memory);
  }
  return 0;
}
