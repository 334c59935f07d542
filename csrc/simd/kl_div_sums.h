// What kl_div has to know of whole rows before any gradient: sums, the mixture of the JSD, statistics on request.
// Compiled once per target.
//
// Rows come as tiles, see simd/tiles.h. Exponents are (z - maximum) / T, and the cross term sums e * (a_t - a_s) with
// a = z - reference, so that offsets cancel before anything is rounded. A column that does not exist (-inf; the padding
// of a last partial step too) has a = kLowest, which keeps the difference of two of them at 0.
//
// The first sweep reads the rows from memory. What the gradient needs of a column is kept: the two exponentials, or one
// and the log-ratio that it is multiplied by.
#include "simd/tiles.h"

namespace {

constexpr float kLowest = -1e30f;

// Rows of a tile as the lanes see them: temperatures, labels, validity.
struct Lanes {
  Vec temperature, inverse_t, label, label_logit;
  VecInt valid;

  template <class T>
  Lanes(const KlDivTask& task, int64_t row, int64_t rows, const T* student)
      : temperature(splat(task.temperature)),
        inverse_t(splat(1.0f / task.temperature)),
        label(splat(-1.0f)),
        label_logit(Vec{}),
        valid(VecInt{} - 1) {
    if (task.valid == nullptr && task.row_temperature == nullptr && task.labels == nullptr) return;
    for (int k = 0; k < kLanes; ++k) {
      const int64_t r = rows > 1 && row + k < task.rows ? row + k : row;
      if (task.valid) valid[k] = -(int)task.valid[r];
      if (task.row_temperature) temperature[k] = task.row_temperature[r];
      if (task.labels == nullptr || !valid[k]) continue;
      label[k] = (float)task.labels[r];
      label_logit[k] = to_float(student[r * task.student_stride + task.labels[r]]);
    }
    if (task.row_temperature) inverse_t = 1.0f / temperature;
  }
};

// Statistics of the rows of a tile, or of one strip of it.
struct Sums {
  Vec inverse_t, scale;     // 1 / T, log2(e) / T
  Vec origin_s, origin_t;   // references of a
  Vec max_s, max_t;         // of z; 0 where no column exists
  Vec per_s, per_t;         // 1 / sum of e^((z - max) / T)
  Vec cross;                // mean of a_t - a_s under the teacher; reverse: of a_s - a_t under the student
  Vec gap;                  // logarithm of the student's normaliser less that of the teacher
  VecInt empty_s, empty_t;  // no column exists
  VecInt infinite;          // one model excludes what the other allows

  Vec a_s(Vec x) const { return max(splat(kLowest), x - origin_s); }
  Vec a_t(Vec y) const { return max(splat(kLowest), y - origin_t); }
  Vec power_s(Vec x) const { return exp2((x - max_s) * scale); }
  Vec power_t(Vec y) const { return exp2((y - max_t) * scale); }

  // The same of an earlier maximum, which is 0 in a lane that had met nothing and may then lie above: what it is
  // multiplied with is 0, but not what it would overflow to.
  Vec decay_s(Vec earlier) const { return exp2(min(Vec{}, (earlier - max_s) * scale)); }
  Vec decay_t(Vec earlier) const { return exp2(min(Vec{}, (earlier - max_t) * scale)); }

  template <class Tile>
  Sums on(int strip) const {
    const auto spread = [strip](Vec v) { return Tile::spread(v, strip); };
    return {spread(inverse_t), spread(scale), spread(origin_s), spread(origin_t), spread(max_s),
            spread(max_t),     spread(per_s), spread(per_t),    spread(cross),    spread(gap),
            empty_s,           empty_t,       infinite};
  }
};

inline Vec zero_if_none(Vec maximum) { return select(maximum == -kInfinity, Vec{}, maximum); }

// One value per strip; of the strips that a group at the end lacks, 0.
template <class Tile>
struct PerStrip {
  Vec of[Tile::kStrips];
  explicit PerStrip(const Tile& tile) {
    for (int r = tile.strips(); r < Tile::kStrips; ++r) of[r] = Vec{};
  }
  Vec& operator[](int r) { return of[r]; }
  operator const Vec*() const { return of; }
};

// Rows in which the model that the divergence is measured against excludes what the other allows.
template <Divergence D, class Tile>
VecInt excluded(const Tile& tile) {
  PerStrip<Tile> found(tile);
  for (int r = 0; r < tile.strips(); ++r) {
    found[r] = Vec{};
    tile.each(r, 0, tile.steps(), [&](int64_t, Vec x, Vec y) {
      const Vec without = D == Divergence::reverse ? y : x, with = D == Divergence::reverse ? x : y;
      found[r] = select((without == -kInfinity) & (with > -kInfinity), splat(1.0f), found[r]);
    });
  }
  return Tile::fold_max(found) > 0.0f;
}

// The first sweep. Each block is read twice, for its maxima and for its sums, the second time from the L1 cache.
template <Divergence D, class Tile>
struct Sweep {
  static constexpr bool kReverse = D == Divergence::reverse;
  Tile& tile;
  const bool keep;
  Sums all{};
  PerStrip<Tile> top_s, top_t, low, beside, sum_s, sum_t, cross;

  Sweep(Tile& tile, const Lanes& lanes, bool keep)
      : tile(tile),
        keep(keep),
        top_s(tile),
        top_t(tile),
        low(tile),
        beside(tile),
        sum_s(tile),
        sum_t(tile),
        cross(tile) {
    all.inverse_t = lanes.inverse_t;
    all.scale = lanes.inverse_t * kLog2e;
  }

  void find_maxima(int64_t begin, int64_t end) {
    for (int r = 0; r < tile.strips(); ++r) {
      Vec most_s = splat(-kInfinity), most_t = most_s, least = splat(kInfinity), next{};
      if (begin > 0) most_s = top_s[r], most_t = top_t[r], least = low[r], next = beside[r];
      const Pairs pairs = tile.pairs(r);
      tile.each(r, begin, end, [&](int64_t i, Vec x, Vec y) {
        if (kReverse && begin == 0) next = select(x > most_s, y, next);
        most_s = max(x, most_s);
        most_t = max(y, most_t);
        least = min(tile.present(i, kReverse ? y : x), least);
        Tile::convert(pairs, i, x, y);
      });
      top_s[r] = most_s, top_t[r] = most_t, low[r] = least, beside[r] = next;
    }
  }

  void choose_origins(Vec max_s, Vec max_t) {
    all.origin_s = zero_if_none(max_s);
    all.origin_t = zero_if_none(max_t);
    if (!kReverse) return;
    // What the student is surest of weighs most in the reverse divergence: there a_t - a_s should be small.
    for (int r = 0; r < tile.strips(); ++r)
      beside[r] = select(top_s[r] == Tile::spread(all.origin_s, r), beside[r], splat(-kInfinity));
    all.origin_t = zero_if_none(Tile::fold_max(beside));
  }

  void raise_maxima(Vec max_s, Vec max_t, bool first) {
    const Sums before = all;
    all.max_s = zero_if_none(max_s);
    all.max_t = zero_if_none(max_t);
    if (first) return;
    const Vec decay_s = all.decay_s(before.max_s), decay_t = all.decay_t(before.max_t);
    sum_s[0] *= decay_s;
    sum_t[0] *= decay_t;
    cross[0] *= kReverse ? decay_s : decay_t;
  }

  void add_up(int64_t begin, int64_t end) {
    for (int r = 0; r < tile.strips(); ++r) {
      const Sums s = all.template on<Tile>(r);
      const Pairs pairs = tile.pairs(r);
      const auto next = tile.next(r);
      Vec student{}, teacher{}, both{};
      tile.again(r, begin, end, [&](int64_t i, Vec x, Vec y) {
        next.prefetch(i);
        const Vec a = s.a_s(x), b = s.a_t(y);  // of a single block the references are the maxima
        const Vec e_s = Tile::kOneBlock ? exp2(a * s.scale) : s.power_s(x);
        const Vec e_t = Tile::kOneBlock && !kReverse ? exp2(b * s.scale) : s.power_t(y);
        student += e_s;
        teacher += e_t;
        if (D == Divergence::forward) both = fma(e_t, b - a, both);
        if (kReverse) both = fma(e_s, a - b, both);
        if (D != Divergence::jsd && keep) pairs.keep(i, e_s, kReverse ? a - b : e_t);
      });
      if (begin > 0) student += sum_s[r], teacher += sum_t[r], both += cross[r];
      sum_s[r] = student, sum_t[r] = teacher, cross[r] = both;
    }
  }

  Sums run() {
    const int64_t steps = tile.steps();
    Vec max_s{}, max_t{};
    for (int64_t begin = 0; begin < steps; begin += Tile::kBlock) {
      const int64_t end = begin + Tile::kBlock < steps ? begin + Tile::kBlock : steps;
      find_maxima(begin, end);
      max_s = Tile::running_max(top_s), max_t = Tile::running_max(top_t);
      if (begin == 0) choose_origins(Tile::fold_max(top_s), Tile::fold_max(top_t));
      raise_maxima(max_s, max_t, begin == 0);
      if (!Tile::kOneBlock && keep) tile.maxima().keep(begin / Tile::kBlock, all.max_s, all.max_t);
      add_up(begin, end);
    }
    if (!Tile::kOneBlock) {
      max_s = Tile::fold_max(top_s), max_t = Tile::fold_max(top_t);
      raise_maxima(max_s, max_t, false);
    }
    const Vec student = Tile::fold_sum(sum_s), teacher = Tile::fold_sum(sum_t);
    all.per_s = 1.0f / student;
    all.per_t = 1.0f / teacher;
    all.cross = Tile::fold_sum(cross) * (kReverse ? all.per_s : all.per_t);
    all.gap = fma((all.max_s - all.origin_s) - (all.max_t - all.origin_t), all.inverse_t, log(student * all.per_t));
    all.empty_s = (max_s == -kInfinity) & (student == student);  // maxima pass over a NaN, sums do not
    all.empty_t = (max_t == -kInfinity) & (teacher == teacher);
    all.infinite = all.empty_s ^ all.empty_t;
    if (D != Divergence::jsd && any(Tile::fold_min(low) == -kInfinity)) all.infinite |= excluded<D>(tile);
    return all;
  }
};

// The Jensen-Shannon divergence from r = log(p_t / p_s): what is small is never a difference of logarithms.
struct Mixture {
  Vec loss, to_student;  // the divergence, and KL(p_s | m)

  struct Point {
    Vec p_s, p_t, to_s, to_t;  // to_*: log(p_* / m)
  };
  static Point at(const Sums& s, Vec beta, Vec x, Vec y) {
    const Vec none{}, r = fma(s.a_t(y) - s.a_s(x), s.inverse_t, s.gap), up = max(none, r), down = min(none, r);
    const Vec quotient = exp2((down - up) * kLog2e), larger = select(r > none, beta, 1.0f - beta);
    const Vec to_larger = -log(fma(1.0f - larger, quotient, larger));
    return {s.power_s(x) * s.per_s, s.power_t(y) * s.per_t, to_larger - up, to_larger + down};
  }
};

template <class Tile>
Mixture mix(Tile& tile, const Sums& all, Vec beta, bool keep) {
  PerStrip<Tile> loss(tile), students(tile);  // the second: of the student's half alone
  for (int r = 0; r < tile.strips(); ++r) {
    const Sums s = all.template on<Tile>(r);
    const Pairs pairs = tile.pairs(r);
    loss[r] = students[r] = Vec{};
    for (int64_t begin = 0; begin < tile.steps(); begin += Tile::kBlock) {
      Vec whole{}, half{};
      tile.again(r, begin, begin + Tile::kBlock < tile.steps() ? begin + Tile::kBlock : tile.steps(),
                 [&](int64_t i, Vec x, Vec y) {
                   const Mixture::Point p = Mixture::at(s, beta, x, y);
                   const Vec student = p.p_s * p.to_s;
                   whole = fma(beta, p.p_t * p.to_t, fma(1.0f - beta, student, whole));
                   half += student;
                   if (keep) pairs.keep(i, p.p_s, p.to_s);
                 });
      loss[r] += whole;
      students[r] += half;
    }
  }
  return {Tile::fold_sum(loss), Tile::fold_sum(students)};
}

// What the hard labels and the statistics need besides: softmax at T = 1, entropies and the most likely columns.
struct Extras {
  Vec top, per_1, log_1;  // of z; 1 / sum of e^(z - top), and the logarithm of that sum
  Vec entropy_s, entropy_t, agreement;
};

template <class Tile>
Extras look(const Tile& tile, const Sums& all) {
  Extras e{};
  const int64_t steps = tile.steps();
  e.top = all.max_s;
  PerStrip<Tile> top_s(tile), top_t(tile), spread_s(tile), spread_t(tile), sum_1(tile);
  for (int r = 0; r < tile.strips(); ++r) {
    const Sums s = all.template on<Tile>(r);
    Vec first_s = splat(0x1p30f), first_t = first_s, sum{}, surprise_s{}, surprise_t{};
    tile.each(r, 0, steps, [&](int64_t i, Vec x, Vec y) {
      const Vec column = tile.column(i);
      first_s = min(first_s, select(x == s.max_s, column, splat(0x1p30f)));
      first_t = min(first_t, select(y == s.max_t, column, splat(0x1p30f)));
      sum += exp2((x - s.max_s) * kLog2e);
      surprise_s = fma(s.power_s(x), max(splat(kLowest), x - s.max_s), surprise_s);
      surprise_t = fma(s.power_t(y), max(splat(kLowest), y - s.max_t), surprise_t);
    });
    top_s[r] = first_s, top_t[r] = first_t;
    spread_s[r] = surprise_s, spread_t[r] = surprise_t;
    sum_1[r] = sum;
  }
  const VecInt same = Tile::fold_min(top_s) == Tile::fold_min(top_t);
  e.agreement = select(same, splat(1.0f), Vec{});
  const Vec sum = Tile::fold_sum(sum_1);
  e.per_1 = 1.0f / sum;
  e.log_1 = log(sum);
  e.entropy_s = -log(all.per_s) - Tile::fold_sum(spread_s) * all.per_s * all.inverse_t;
  e.entropy_t = -log(all.per_t) - Tile::fold_sum(spread_t) * all.per_t * all.inverse_t;
  return e;
}

}  // namespace
