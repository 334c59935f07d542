// KL and JSD of two rows of logits with the gradient, compiled once per target.
//
// Rows come as tiles, see simd/tiles.h: long rows by themselves, short rows kLanes at a time.
//
// Exponents are (z - maximum) / T, and the cross term sums e * (a_t - a_s) with a = z - reference, so that offsets
// cancel before anything is rounded. A column that does not exist (-inf; the padding of a last partial step too) has
// a = kLowest, which keeps the difference of two of them at 0. The first sweep streams the row from memory once, with
// running maxima per lane; the second finds it in the L2 cache.
#include "simd/tiles.h"

namespace {

constexpr float kLowest = -1e30f;
// Steps per running maximum and partial sum: enough to hide their cost, few enough for L1 and for exact sums.
constexpr int64_t kBlock = 32;

// Statistics of a tile, equal in all lanes that belong to one row.
struct Sums {
  Vec inverse_t;            // 1 / T
  Vec scale;                // log2(e) / T
  Vec origin_s, origin_t;   // references of a
  Vec max_s, max_t;         // of z; 0 where no column exists
  Vec sum_s, sum_t;         // of e^((z - max) / T)
  Vec cross;                // of e^((z_t - max_t) / T) * (a_t - a_s); reverse: the other way round
  VecInt empty_s, empty_t;  // no column exists
  VecInt infinite;          // one model excludes what the other allows
  Vec a_s(Vec x) const { return max(splat(kLowest), x - origin_s); }
  Vec a_t(Vec y) const { return max(splat(kLowest), y - origin_t); }
  Vec power_s(Vec x) const { return exp2((x - max_s) * scale); }
  Vec power_t(Vec y) const { return exp2((y - max_t) * scale); }
  // Logarithm of the student's normaliser less that of the teacher.
  Vec gap() const { return fma((max_s - origin_s) - (max_t - origin_t), inverse_t, log(sum_s / sum_t)); }
};

inline Vec zero_if_none(Vec maximum) { return select(maximum == -kInfinity, Vec{}, maximum); }

template <Divergence D, class Tile>
Sums sweep(const Tile& tile, Vec temperature) {
  Sums s{};
  s.inverse_t = 1.0f / temperature;
  s.scale = kLog2e / temperature;
  const int64_t steps = tile.steps();
  Vec top_s = splat(-kInfinity), top_t = top_s, low = splat(kInfinity);
  Vec sum_s{}, sum_t{}, cross{}, beside{};
  for (int64_t begin = 0; begin < steps; begin += kBlock) {
    const int64_t end = begin + kBlock < steps ? begin + kBlock : steps;
    tile.each(begin, end, [&](int64_t i, Vec x, Vec y) {
      if (D == Divergence::reverse) beside = select(x > top_s, y, beside);
      top_s = max(x, top_s);
      top_t = max(y, top_t);
      low = min(tile.present(i, D == Divergence::reverse ? y : x), low);
    });
    if (begin == 0) {
      s.origin_s = zero_if_none(Tile::all_max(top_s));
      // What the student is surest of weighs most in the reverse divergence: there a_t - a_s should be small.
      s.origin_t = zero_if_none(D == Divergence::reverse ? Tile::at_max(top_s, beside) : Tile::all_max(top_t));
      s.max_s = zero_if_none(top_s);
      s.max_t = zero_if_none(top_t);
    } else {
      const Vec old_s = s.max_s, old_t = s.max_t;
      s.max_s = zero_if_none(top_s);
      s.max_t = zero_if_none(top_t);
      const Vec decay_s = s.power_s(old_s), decay_t = s.power_t(old_t);
      sum_s *= decay_s;
      sum_t *= decay_t;
      cross *= D == Divergence::reverse ? decay_s : decay_t;
    }
    Vec part_s{}, part_t{}, part_cross{};
    tile.each(begin, end, [&](int64_t i, Vec x, Vec y) {
      tile.prefetch(i + kBlock);
      const Vec a = s.a_s(x), b = s.a_t(y), e_s = s.power_s(x), e_t = s.power_t(y);
      part_s += e_s;
      part_t += e_t;
      if (D == Divergence::forward) part_cross = fma(e_t, b - a, part_cross);
      if (D == Divergence::reverse) part_cross = fma(e_s, a - b, part_cross);
    });
    sum_s += part_s;
    sum_t += part_t;
    cross += part_cross;
  }
  const Vec old_s = s.max_s, old_t = s.max_t;
  s.max_s = zero_if_none(Tile::all_max(top_s));
  s.max_t = zero_if_none(Tile::all_max(top_t));
  const Vec decay_s = s.power_s(old_s), decay_t = s.power_t(old_t);
  s.sum_s = Tile::all_sum(sum_s * decay_s);
  s.sum_t = Tile::all_sum(sum_t * decay_t);
  s.cross = Tile::all_sum(cross * (D == Divergence::reverse ? decay_s : decay_t));
  s.empty_s = Tile::all_max(top_s) == -kInfinity;
  s.empty_t = Tile::all_max(top_t) == -kInfinity;
  s.infinite = s.empty_s ^ s.empty_t;
  if (D != Divergence::jsd && fold_min(low) == -kInfinity) {
    Vec excluded{};
    tile.each(0, steps, [&](int64_t, Vec x, Vec y) {
      const Vec without = D == Divergence::reverse ? y : x, with = D == Divergence::reverse ? x : y;
      excluded = select((without == -kInfinity) & (with > -kInfinity), splat(1.0f), excluded);
    });
    s.infinite |= Tile::all_max(excluded) > 0.0f;
  }
  return s;
}

// The Jensen-Shannon divergence from r = log(p_t / p_s): what is small is never a difference of logarithms.
struct Mixture {
  Vec beta, per_s, per_t, gap;  // 1 / sums, and the gap of the normalisers
  Vec loss, to_student;         // the divergence, and KL(p_s | m)

  struct Point {
    Vec p_s, p_t, to_s, to_t;  // to_*: log(p_* / m)
  };
  Point at(const Sums& s, Vec x, Vec y) const {
    const Vec none{}, r = fma(s.a_t(y) - s.a_s(x), s.inverse_t, gap), up = max(none, r), down = min(none, r);
    const Vec quotient = exp2((down - up) * kLog2e), larger = select(r > none, beta, 1.0f - beta);
    const Vec to_larger = -log(fma(1.0f - larger, quotient, larger));
    return {s.power_s(x) * per_s, s.power_t(y) * per_t, to_larger - up, to_larger + down};
  }
};

template <class Tile>
Mixture mix(const Tile& tile, const Sums& s, float beta) {
  Mixture m{splat(beta), 1.0f / s.sum_s, 1.0f / s.sum_t, s.gap(), Vec{}, Vec{}};
  Vec loss{}, to_student{};
  for (int64_t begin = 0; begin < tile.steps(); begin += kBlock) {
    Vec part{}, part_student{};
    tile.each(begin, begin + kBlock < tile.steps() ? begin + kBlock : tile.steps(), [&](int64_t, Vec x, Vec y) {
      const Mixture::Point p = m.at(s, x, y);
      const Vec student = p.p_s * p.to_s;
      part = fma(m.beta, p.p_t * p.to_t, fma(1.0f - m.beta, student, part));
      part_student += student;
    });
    loss += part;
    to_student += part_student;
  }
  m.loss = Tile::all_sum(loss);
  m.to_student = Tile::all_sum(to_student);
  return m;
}

// What the hard labels and the statistics need besides: softmax at T = 1, entropies and the most likely columns.
struct Extras {
  Vec top, sum_1;  // of z, and of e^(z - top)
  Vec entropy_s, entropy_t, agreement;
};

template <class Tile>
Extras look(const Tile& tile, const Sums& s) {
  Extras e{};
  const int64_t steps = tile.steps();
  Vec top_s = splat(-kInfinity), top_t = top_s, arg_s{}, arg_t{};
  tile.each(0, steps, [&](int64_t i, Vec x, Vec y) {
    const Vec column = tile.column(i);
    arg_s = select(x > top_s, column, arg_s);
    arg_t = select(y > top_t, column, arg_t);
    top_s = max(x, top_s);
    top_t = max(y, top_t);
  });
  const Vec best_s = Tile::all_max(top_s), best_t = Tile::all_max(top_t), beyond = splat(0x1p30f);
  const Vec first_s = Tile::all_min(select(top_s == best_s, arg_s, beyond));
  const Vec first_t = Tile::all_min(select(top_t == best_t, arg_t, beyond));
  e.agreement = select(first_s == first_t, splat(1.0f), Vec{});
  e.top = zero_if_none(best_s);
  Vec sum_1{}, surprise_s{}, surprise_t{};
  tile.each(0, steps, [&](int64_t, Vec x, Vec y) {
    sum_1 += exp2((x - e.top) * kLog2e);
    surprise_s = fma(s.power_s(x), max(splat(kLowest), x - s.max_s), surprise_s);
    surprise_t = fma(s.power_t(y), max(splat(kLowest), y - s.max_t), surprise_t);
  });
  e.sum_1 = Tile::all_sum(sum_1);
  e.entropy_s = log(s.sum_s) - Tile::all_sum(surprise_s) / s.sum_s * s.inverse_t;
  e.entropy_t = log(s.sum_t) - Tile::all_sum(surprise_t) / s.sum_t * s.inverse_t;
  return e;
}

// Rows of a tile as the lanes see them: labels, temperatures, validity.
struct Lanes {
  Vec temperature, label, label_logit;
  VecInt valid;

  template <class T>
  Lanes(const KlDivTask& task, int64_t row, int64_t rows, const T* student)
      : temperature(splat(task.temperature)), label(splat(-1.0f)), label_logit(Vec{}), valid(VecInt{} - 1) {
    if (task.valid == nullptr && task.row_temperature == nullptr && task.labels == nullptr) return;
    for (int k = 0; k < kLanes; ++k) {
      const int64_t r = rows > 1 && row + k < task.rows ? row + k : row;
      if (task.valid) valid[k] = -(int)task.valid[r];
      if (task.row_temperature) temperature[k] = task.row_temperature[r];
      if (task.labels == nullptr || !valid[k]) continue;
      label[k] = (float)task.labels[r];
      label_logit[k] = to_float(student[r * task.student_stride + task.labels[r]]);
    }
  }
};

// The gradient in the student's logits: per * d(divergence) + hard * d(cross-entropy).
template <Divergence D, class Tile>
void gradient(const Tile& tile, const Sums& s, const Mixture& m, const Extras& e, const Lanes& lanes, VecInt alive,
              Vec per, float hard) {
  const Vec of_s = per / s.sum_s, minus_t = -per / s.sum_t, mean_cross = s.cross / s.sum_s;
  const Vec of_nats = of_s * s.inverse_t, pull = (1.0f - m.beta) * per;
  const bool whole = hard == 0.0f && fold_min(select(alive, splat(1.0f), Vec{})) > 0.0f;
  const auto soft = [&](Vec x, Vec y) {
    if (D == Divergence::forward) return fma(s.power_s(x), of_s, s.power_t(y) * minus_t);
    if (D == Divergence::reverse) return s.power_s(x) * of_nats * ((s.a_s(x) - s.a_t(y)) - mean_cross);
    const Mixture::Point p = m.at(s, x, y);
    return pull * p.p_s * (p.to_s - m.to_student);
  };
  if (whole) {
    tile.each(0, tile.steps(), [&](int64_t i, Vec x, Vec y) { tile.put(i, soft(x, y)); });
    return;
  }
  const Vec of_1 = hard != 0.0f ? hard / e.sum_1 : Vec{};
  tile.each(0, tile.steps(), [&](int64_t i, Vec x, Vec y) {
    Vec g = soft(x, y);
    if (hard != 0.0f) {
      g += exp2((x - e.top) * kLog2e) * of_1;
      g -= select(tile.column(i) == lanes.label, splat(hard), Vec{});
    }
    tile.put(i, select(alive, g, Vec{}));
  });
}

template <class Tile>
void write(float* out, int64_t row, int64_t rows, Vec v) {
  for (int64_t k = 0; k < Tile::kRows && row + k < rows; ++k) out[row + k] = v[k];
}

template <Divergence D, class Tile>
void compute(const KlDivTask& task, int64_t row, const Tile& tile, const Lanes& lanes) {
  const Sums s = sweep<D>(tile, lanes.temperature);
  Mixture m{};
  if (D == Divergence::jsd) m = mix(tile, s, task.beta);
  const float hard = task.labels ? task.cross_entropy_weight : 0.0f;
  Extras e{};
  if (hard != 0.0f || task.stats) e = look(tile, s);

  const Vec nats = D == Divergence::forward   ? fma(s.cross / s.sum_t, s.inverse_t, s.gap())
                   : D == Divergence::reverse ? fma(s.cross / s.sum_s, s.inverse_t, -s.gap())
                                              : m.loss;
  const Vec square = task.scale_by_temperature ? lanes.temperature * lanes.temperature : splat(1.0f);
  Vec loss = nats * square;
  Vec cross_entropy{};
  VecInt infinite = s.infinite;
  if (e.sum_1[0] != 0.0f && task.labels) {
    cross_entropy = log(e.sum_1) + (e.top - lanes.label_logit);
    if (hard != 0.0f) {
      loss += hard * cross_entropy;
      infinite |= (lanes.label_logit == -kInfinity) & ~s.empty_s;
    }
  }
  const VecInt exists = lanes.valid & ~(s.empty_s & s.empty_t), alive = exists & ~infinite;
  loss = select(infinite & exists, splat(kInfinity), select(alive, loss, Vec{}));
  write<Tile>(task.loss, row, task.rows, loss);
  if (task.stats) {
    const VecInt seen = lanes.valid & ~(s.empty_s | s.empty_t);
    const Vec stats[] = {cross_entropy, e.entropy_s, e.entropy_t, e.agreement};
    for (int k = 0; k < 4; ++k) write<Tile>(task.stats + k * task.rows, row, task.rows, select(seen, stats[k], Vec{}));
  }
  if (task.grad)
    gradient<D>(tile, s, m, e, lanes, alive, square / lanes.temperature * task.grad_scale, hard * task.grad_scale);
}

template <class Tile, class T>
void tiles(const KlDivTask& task, int64_t begin, int64_t end, const T* student, T* grad) {
  const auto run = task.divergence == Divergence::forward   ? compute<Divergence::forward, Tile>
                   : task.divergence == Divergence::reverse ? compute<Divergence::reverse, Tile>
                                                            : compute<Divergence::jsd, Tile>;
  for (int64_t row = begin; row < end; row += Tile::kRows) {
    if (Tile::kRows == 1 && task.valid && !task.valid[row]) {
      if (grad) std::memset(grad + row * task.vocabulary, 0, task.vocabulary * sizeof(T));
      continue;
    }
    const Tile tile(task, row, student);
    run(task, row, tile, Lanes(task, row, Tile::kRows, student));
    if (grad) tile.finish(grad);
  }
}

template <class T>
void rows_of(const KlDivTask& task, int64_t begin, int64_t end) {
  const bool narrow = task.vocabulary <= ShortRows::kColumns;
  (narrow ? tiles<ShortRows, T> : tiles<LongRow<T>, T>)(task, begin, end, (const T*)task.student, (T*)task.grad);
}

}  // namespace

// Rows begin..end; for short rows begin must be a multiple of 16, so that results do not depend on the split.
static void kl_div(const KlDivTask& task, int64_t begin, int64_t end) {
  switch (task.dtype) {
    case Dtype::float32:
      return rows_of<float>(task, begin, end);
    case Dtype::bfloat16:
      return rows_of<BFloat16>(task, begin, end);
    case Dtype::float16:
      return rows_of<Half>(task, begin, end);
  }
}
