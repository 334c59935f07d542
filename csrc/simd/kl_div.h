// KL and JSD of two rows of logits with the gradient, compiled once per target.
//
// A tile is kLanes lanes wide. Long rows take one tile each, its lanes being neighbouring columns (LongRow); short rows
// share one, its lanes being neighbouring rows (ShortRows). Both run the same arithmetic: they differ only in how a step
// is loaded and in whether a statistic is folded across the lanes.
//
// Logits enter as u = (z - reference) * log2(e) / T, so that offsets cancel before anything is summed, and columns that
// do not exist (-inf) as kLowest, which keeps differences of two of them at 0. The first sweep streams the row from
// memory once, with running maxima per lane; the second finds it in the L2 cache.
namespace {

constexpr int64_t kBlock = 64;  // steps per running maximum: long enough to hide its cost, short enough for L1

template <class T>
struct LongRow {
  static constexpr int64_t kRows = 1;
  const T *student, *teacher;
  T* grad;
  int64_t full, tail;  // whole steps, and columns in the last partial one

  LongRow(const KlDivTask& task, int64_t row)
      : student((const T*)task.student + row * task.student_stride),
        teacher((const T*)task.teacher + row * task.teacher_stride),
        grad(task.grad ? (T*)task.grad + row * task.vocabulary : nullptr),
        full(task.vocabulary / kLanes),
        tail(task.vocabulary % kLanes) {}

  int64_t steps() const { return full + (tail > 0); }

  template <class F>
  void each(int64_t begin, int64_t end, F f) const {
    const int64_t whole = end < full ? end : full;
    for (int64_t i = begin; i < whole; ++i) f(i, load(student + i * kLanes), load(teacher + i * kLanes));
    if (end > full) f(full, load_tail(student + full * kLanes, tail), load_tail(teacher + full * kLanes, tail));
  }

  void prefetch(int64_t i) const {
    __builtin_prefetch(student + i * kLanes);
    __builtin_prefetch(teacher + i * kLanes);
  }

  void put(int64_t i, Vec g) const {
    if (i < full)
      store(grad + i * kLanes, g);
    else
      store_tail(grad + full * kLanes, g, tail);
  }

  void finish() const {}

  Vec column(int64_t i) const {
    Vec v;
    for (int k = 0; k < kLanes; ++k) v[k] = (float)(i * kLanes + k);
    return v;
  }

  static Vec all_max(Vec v) { return splat(fold_max(v)); }
  static Vec all_min(Vec v) { return splat(fold_min(v)); }
  static Vec all_sum(Vec v) { return splat(fold_sum(v)); }
};

template <class T>
struct ShortRows {
  static constexpr int64_t kRows = kLanes;
  static constexpr int64_t kColumns = 256;  // longest row that is worth transposing: both tiles then fit L1
  float student[kColumns][kLanes];
  mutable float teacher[kColumns][kLanes];  // the gradient takes its place, step by step
  T* grad;
  int64_t columns, rows;

  ShortRows(const KlDivTask& task, int64_t row)
      : grad(task.grad ? (T*)task.grad + row * task.vocabulary : nullptr),
        columns(task.vocabulary),
        rows(task.rows - row < kLanes ? task.rows - row : kLanes) {
    gather(student, (const T*)task.student + row * task.student_stride, task.student_stride);
    gather(teacher, (const T*)task.teacher + row * task.teacher_stride, task.teacher_stride);
  }

  void gather(float (*lanes)[kLanes], const T* p, int64_t stride) const {
    int64_t i = 0;
    for (; rows == kLanes && i + kLanes <= columns; i += kLanes) {
      Vec v[kLanes];
      for (int k = 0; k < kLanes; ++k) v[k] = load(p + k * stride + i);
      transpose(v);
      for (int k = 0; k < kLanes; ++k) store(lanes[i + k], v[k]);
    }
    for (; i < columns; ++i)
      for (int k = 0; k < kLanes; ++k) lanes[i][k] = to_float(p[(k < rows ? k : 0) * stride + i]);
  }

  int64_t steps() const { return columns; }

  template <class F>
  void each(int64_t begin, int64_t end, F f) const {
    for (int64_t i = begin; i < end; ++i) f(i, load(student[i]), load(teacher[i]));
  }

  void prefetch(int64_t) const {}

  void put(int64_t i, Vec g) const { store(teacher[i], g); }

  void finish() const {
    int64_t i = 0;
    for (; rows == kLanes && i + kLanes <= columns; i += kLanes) {
      Vec v[kLanes];
      for (int k = 0; k < kLanes; ++k) v[k] = load(teacher[i + k]);
      transpose(v);
      for (int k = 0; k < kLanes; ++k) store(grad + k * columns + i, v[k]);
    }
    for (; i < columns; ++i) {
      T lanes[kLanes];
      store(lanes, load(teacher[i]));
      for (int k = 0; k < rows; ++k) grad[k * columns + i] = lanes[k];
    }
  }

  Vec column(int64_t i) const { return splat((float)i); }

  static Vec all_max(Vec v) { return v; }
  static Vec all_min(Vec v) { return v; }
  static Vec all_sum(Vec v) { return v; }
};

// Statistics of a tile, equal in all lanes that belong to one row.
struct Sums {
  Vec scale;                    // log2(e) / T
  Vec shift_s, shift_t;         // -reference * scale
  Vec max_s, max_t;             // of u
  Vec sum_s, sum_t;             // of 2^(u - max)
  Vec cross;                    // of 2^(u_t - max_t) * (u_t - u_s); reverse: the other way round
  VecInt empty_s, empty_t;      // no column exists
  VecInt infinite;              // one model excludes what the other allows
  Vec u_s(Vec x) const { return max(splat(kLowest), fma(x, scale, shift_s)); }
  Vec u_t(Vec y) const { return max(splat(kLowest), fma(y, scale, shift_t)); }
};

inline Vec zero_if_none(Vec maximum) { return select(maximum == -kInfinity, Vec{}, maximum); }

template <Divergence D, class Tile>
Sums sweep(const Tile& tile, Vec scale) {
  Sums s{};
  s.scale = scale;
  const int64_t steps = tile.steps();
  Vec top_s = splat(-kInfinity), top_t = top_s, low = splat(kInfinity);
  Vec max_s{}, max_t{}, sum_s{}, sum_t{}, cross{};
  for (int64_t begin = 0; begin < steps; begin += kBlock) {
    const int64_t end = begin + kBlock < steps ? begin + kBlock : steps;
    tile.each(begin, end, [&](int64_t, Vec x, Vec y) {
      top_s = max(x, top_s);
      top_t = max(y, top_t);
      low = min(D == Divergence::reverse ? y : x, low);
    });
    if (begin == 0) {
      s.shift_s = -zero_if_none(Tile::all_max(top_s)) * scale;
      s.shift_t = -zero_if_none(Tile::all_max(top_t)) * scale;
      max_s = s.u_s(zero_if_none(top_s));
      max_t = s.u_t(zero_if_none(top_t));
    } else {
      const Vec new_s = s.u_s(zero_if_none(top_s)), new_t = s.u_t(zero_if_none(top_t));
      const Vec decay_s = exp2(max_s - new_s), decay_t = exp2(max_t - new_t);
      sum_s *= decay_s;
      sum_t *= decay_t;
      cross *= D == Divergence::reverse ? decay_s : decay_t;
      max_s = new_s;
      max_t = new_t;
    }
    tile.each(begin, end, [&](int64_t i, Vec x, Vec y) {
      tile.prefetch(i + kBlock);
      const Vec u = s.u_s(x), w = s.u_t(y);
      const Vec e_s = exp2(u - max_s), e_t = exp2(w - max_t);
      sum_s += e_s;
      sum_t += e_t;
      if (D == Divergence::forward) cross = fma(e_t, w - u, cross);
      if (D == Divergence::reverse) cross = fma(e_s, u - w, cross);
    });
  }
  s.max_s = Tile::all_max(max_s);
  s.max_t = Tile::all_max(max_t);
  const Vec decay_s = exp2(max_s - s.max_s), decay_t = exp2(max_t - s.max_t);
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

// Both halves of the Jensen-Shannon divergence, in bits.
struct Mixture {
  Vec beta, log_s, log_t;  // log_*: max + log2(sum), so that log2 p = u - log_*
  Vec to_teacher, to_student;
  Vec log_m(Vec log_ps, Vec log_pt) const {
    const Vec m = fma(beta, exp2(log_pt), (1.0f - beta) * exp2(log_ps));
    return log2(max(splat(0x1p-126f), m));
  }
};

template <class Tile>
Mixture mix(const Tile& tile, const Sums& s, float beta) {
  Mixture m{};
  m.beta = splat(beta);
  m.log_s = s.max_s + log2(s.sum_s);
  m.log_t = s.max_t + log2(s.sum_t);
  Vec to_teacher{}, to_student{};
  tile.each(0, tile.steps(), [&](int64_t, Vec x, Vec y) {
    const Vec log_ps = s.u_s(x) - m.log_s, log_pt = s.u_t(y) - m.log_t, log_m = m.log_m(log_ps, log_pt);
    to_teacher = fma(exp2(log_pt), log_pt - log_m, to_teacher);
    to_student = fma(exp2(log_ps), log_ps - log_m, to_student);
  });
  m.to_teacher = Tile::all_sum(to_teacher);
  m.to_student = Tile::all_sum(to_student);
  return m;
}

// What the hard labels and the statistics need besides: softmax at T = 1, entropies and the most likely columns.
struct Extras {
  Vec max_1, sum_1;  // of z * log2(e), and of 2^(z * log2(e) - max_1)
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
  e.max_1 = zero_if_none(best_s) * kLog2e;
  Vec sum_1{}, surprise_s{}, surprise_t{};
  tile.each(0, steps, [&](int64_t, Vec x, Vec y) {
    const Vec u = s.u_s(x) - s.max_s, w = s.u_t(y) - s.max_t;
    sum_1 += exp2(max(splat(kLowest), fma(x, splat(kLog2e), -e.max_1)));
    surprise_s = fma(exp2(u), u, surprise_s);
    surprise_t = fma(exp2(w), w, surprise_t);
  });
  e.sum_1 = Tile::all_sum(sum_1);
  e.entropy_s = kLn2 * (log2(s.sum_s) - Tile::all_sum(surprise_s) / s.sum_s);
  e.entropy_t = kLn2 * (log2(s.sum_t) - Tile::all_sum(surprise_t) / s.sum_t);
  return e;
}

// Rows of a tile as the lanes see them: labels, temperatures, validity.
template <class Tile>
struct Lanes {
  Vec temperature, label, label_logit;
  VecInt valid;

  template <class T>
  Lanes(const KlDivTask& task, int64_t row, const T* student)
      : temperature(splat(task.temperature)), label(splat(-1.0f)), label_logit(Vec{}), valid(VecInt{} - 1) {
    if (task.valid == nullptr && task.row_temperature == nullptr && task.labels == nullptr) return;
    for (int k = 0; k < kLanes; ++k) {
      const int64_t r = Tile::kRows == 1 ? row : row + k < task.rows ? row + k : row;
      if (task.valid) valid[k] = -(int)task.valid[r];
      if (task.row_temperature) temperature[k] = task.row_temperature[r];
      if (task.labels == nullptr || !valid[k]) continue;
      label[k] = (float)task.labels[r];
      label_logit[k] = to_float(student[r * task.student_stride + task.labels[r]]);
    }
  }
};

// The gradient in the student's logits: per * d(divergence) + hard * d(cross-entropy).
template <Divergence D, class Tile, class L>
void gradient(const Tile& tile, const Sums& s, const Mixture& m, const Extras& e, const L& lanes, VecInt alive, Vec per,
              float hard) {
  const Vec of_s = per / s.sum_s, minus_t = -per / s.sum_t, mean_cross = s.cross / s.sum_s;
  const Vec bits_s = of_s * kLn2, pull = (1.0f - m.beta) * per * kLn2;
  const bool whole = hard == 0.0f && fold_min(select(alive, splat(1.0f), Vec{})) > 0.0f;
  const Vec base_s = s.shift_s - s.max_s, base_t = s.shift_t - s.max_t;
  const auto soft = [&](Vec x, Vec y) {
    if (D == Divergence::forward)
      return fma(exp2(fma(x, s.scale, base_s)), of_s, exp2(fma(y, s.scale, base_t)) * minus_t);
    const Vec u = s.u_s(x), w = s.u_t(y);
    if (D == Divergence::reverse) return exp2(u - s.max_s) * bits_s * ((u - w) - mean_cross);
    const Vec log_ps = u - m.log_s, log_pt = w - m.log_t;
    return pull * exp2(log_ps) * ((log_ps - m.log_m(log_ps, log_pt)) - m.to_student);
  };
  if (whole) {
    tile.each(0, tile.steps(), [&](int64_t i, Vec x, Vec y) { tile.put(i, soft(x, y)); });
    return;
  }
  const Vec of_1 = hard != 0.0f ? hard / e.sum_1 : Vec{};
  tile.each(0, tile.steps(), [&](int64_t i, Vec x, Vec y) {
    Vec g = soft(x, y);
    if (hard != 0.0f) {
      g += exp2(max(splat(kLowest), fma(x, splat(kLog2e), -e.max_1))) * of_1;
      g -= select(tile.column(i) == lanes.label, splat(hard), Vec{});
    }
    tile.put(i, select(alive, g, Vec{}));
  });
}

template <class Tile>
void write(float* out, int64_t row, int64_t rows, Vec v) {
  for (int64_t k = 0; k < Tile::kRows && row + k < rows; ++k) out[row + k] = v[k];
}

template <Divergence D, class T, template <class> class Layout>
void rows_of_tile(const KlDivTask& task, int64_t row) {
  using Tile = Layout<T>;
  const Tile tile(task, row);
  const Lanes<Tile> lanes(task, row, (const T*)task.student);
  if (Tile::kRows == 1 && !lanes.valid[0]) {
    if (task.grad) std::memset(tile.grad, 0, task.vocabulary * sizeof(T));
    return;
  }
  const Sums s = sweep<D>(tile, kLog2e / lanes.temperature);
  Mixture m{};
  if (D == Divergence::jsd) m = mix(tile, s, task.beta);
  const float hard = task.labels ? task.cross_entropy_weight : 0.0f;
  Extras e{};
  if (hard != 0.0f || task.stats) e = look(tile, s);

  const Vec gap = (s.max_s - s.max_t) + (log2(s.sum_s) - log2(s.sum_t));
  Vec bits = D == Divergence::forward   ? s.cross / s.sum_t + gap
             : D == Divergence::reverse ? s.cross / s.sum_s - gap
                                        : m.beta * m.to_teacher + (1.0f - m.beta) * m.to_student;
  const Vec square = task.scale_by_temperature ? lanes.temperature * lanes.temperature : splat(1.0f);
  Vec loss = bits * kLn2 * square;
  Vec cross_entropy{};
  VecInt infinite = s.infinite;
  if (e.sum_1[0] != 0.0f && task.labels) {
    cross_entropy = kLn2 * (e.max_1 + log2(e.sum_1)) - lanes.label_logit;
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
  if (task.grad) {
    gradient<D>(tile, s, m, e, lanes, alive, square / lanes.temperature * task.grad_scale, hard * task.grad_scale);
    tile.finish();
  }
}

template <class T, template <class> class Layout>
void rows_as(const KlDivTask& task, int64_t begin, int64_t end) {
  const auto run = task.divergence == Divergence::forward   ? rows_of_tile<Divergence::forward, T, Layout>
                   : task.divergence == Divergence::reverse ? rows_of_tile<Divergence::reverse, T, Layout>
                                                            : rows_of_tile<Divergence::jsd, T, Layout>;
  for (int64_t row = begin; row < end; row += Layout<T>::kRows) run(task, row);
}

template <class T>
void rows_of(const KlDivTask& task, int64_t begin, int64_t end) {
  if (task.vocabulary <= ShortRows<T>::kColumns)
    rows_as<T, ShortRows>(task, begin, end);
  else
    rows_as<T, LongRow>(task, begin, end);
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
