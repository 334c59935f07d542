// How rows of a student and a teacher meet the vectors, compiled once per target.
//
// A tile is worked through in strips of steps, one vector of each model per step. A strip of Rows is one row, its lanes
// being neighbouring columns; the strip of ShortRows is kLanes rows at once, its lanes being rows, its steps columns.
// What is known of whole rows (a maximum, a sum) is one vector per tile: equal in all lanes where the tile is one row,
// lane k belonging to row k otherwise. fold_* makes such a vector of one vector per strip; spread gives a strip its
// part.
//
// A tile keeps two numbers per column, from which the gradient follows without a second exponential. Where a strip is
// worked through in several blocks, it keeps the maxima of each, to which those numbers refer.
namespace {

// Two vectors per step of a strip.
struct Pairs {
  float* memory;
  Vec first(int64_t i) const { return load(memory + 2 * i * kLanes); }
  Vec second(int64_t i) const { return load(memory + (2 * i + 1) * kLanes); }
  void keep_first(int64_t i, Vec a) const { store(memory + 2 * i * kLanes, a); }
  void keep(int64_t i, Vec a, Vec b) const {
    keep_first(i, a);
    store(memory + (2 * i + 1) * kLanes, b);
  }
};

// N rows, one after the other: a long one by itself, or kLanes whose statistics are folded together.
template <class T, int N>
struct Rows {
  static constexpr int kRows = N, kStrips = N;
  static constexpr bool kOneBlock = N > 1;
  // Steps per running maximum and partial sum: of a long row enough to hide their cost, few enough for L1 and for exact
  // sums; of a group all, so that what is kept of 16 rows must fit the cache.
  static constexpr int64_t kBlock = kOneBlock ? kGroupColumns / kLanes : 32;
  const T *student, *teacher;
  T* grad;
  float *kept, *kept_maxima;
  int64_t student_stride, teacher_stride, columns, full, tail;  // full: whole steps; tail: columns in the last one
  int rows;

  Rows(const KlDivTask& task, int64_t row, float* scratch)
      : student((const T*)task.student + row * task.student_stride),
        teacher((const T*)task.teacher + row * task.teacher_stride),
        grad((T*)task.grad + row * task.vocabulary),
        kept(scratch),
        kept_maxima(scratch + 2 * N * padded(task.vocabulary)),
        student_stride(task.student_stride),
        teacher_stride(task.teacher_stride),
        columns(task.vocabulary),
        full(columns / kLanes),
        tail(columns % kLanes),
        rows(task.rows - row < N ? task.rows - row : N) {}

  int strips() const { return N == 1 ? 1 : rows; }
  int64_t steps() const { return full + (tail > 0); }

  template <class F>
  void each(int r, int64_t begin, int64_t end, F f) const {
    const T *x = student + r * student_stride, *y = teacher + r * teacher_stride;
    const int64_t whole = end < full ? end : full;
    for (int64_t i = begin; i < whole; ++i) f(i, load(x + i * kLanes), load(y + i * kLanes));
    if (end > full) f(full, load_tail(x + full * kLanes, tail), load_tail(y + full * kLanes, tail));
  }

  // The same where first and second still hold what convert put there.
  template <class F>
  void again(int r, int64_t begin, int64_t end, F f) const {
    if (std::is_same<T, float>::value) return each(r, begin, end, f);
    const Pairs converted = pairs(r);
    for (int64_t i = begin; i < end; ++i) f(i, converted.first(i), converted.second(i));
  }
  static void convert(Pairs pairs, int64_t i, Vec x, Vec y) {
    if (!std::is_same<T, float>::value) pairs.keep(i, x, y);
  }

  // x with the padding of the last partial step replaced by 0.
  Vec present(int64_t i, Vec x) const { return i < full ? x : select(column(i) < splat((float)columns), x, Vec{}); }

  // What comes after a step: the next block of a long row, or of the next group the counterpart of this row.
  struct Next {
    const T *student, *teacher;
    void prefetch(int64_t i) const {
      __builtin_prefetch(student + i * kLanes);
      __builtin_prefetch(teacher + i * kLanes);
    }
  };
  Next next(int r) const {
    if (N == 1) return {student + kBlock * kLanes, teacher + kBlock * kLanes};
    return {student + (r + N) * student_stride, teacher + (r + N) * teacher_stride};
  }

  Pairs pairs(int r) const { return {kept + 2 * r * padded(columns)}; }
  Pairs maxima() const { return {kept_maxima}; }

  struct Output {
    T* grad;
    int64_t full, tail;
    void put(int64_t i, Vec g) const {
      if (i < full)
        store(grad + i * kLanes, g);
      else
        store_tail(grad + i * kLanes, g, tail);
    }
  };
  Output output(int r) const { return {grad + r * columns, full, tail}; }

  void finish(const KlDivTask&) const {}

  Vec column(int64_t i) const { return iota() + (float)(i * kLanes); }

  template <class F>
  static Vec fold(const Vec* v, F f) {
    return N == 1 ? fold_lanes(v[0], f) : fold_rows(v, f);
  }
  static Vec running_max(const Vec* v) { return N == 1 ? v[0] : fold_max(v); }
  static Vec fold_max(const Vec* v) {
    return fold(v, [](Vec a, Vec b) { return max(a, b); });
  }
  static Vec fold_min(const Vec* v) {
    return fold(v, [](Vec a, Vec b) { return min(a, b); });
  }
  static Vec fold_sum(const Vec* v) {
    return fold(v, [](Vec a, Vec b) { return a + b; });
  }
  static Vec spread(Vec v, int r) { return N == 1 ? v : splat(v[r]); }
};

// kLanes rows side by side, for rows shorter than a vector.
template <class T>
struct ShortRows {
  static constexpr int kRows = kLanes, kStrips = 1;
  static constexpr int64_t kBlock = kShortColumns;
  static constexpr bool kOneBlock = true;
  Vec student[kShortColumns], teacher[kShortColumns], kept[2 * kShortColumns];
  int64_t columns, first_row, rows;

  ShortRows(const KlDivTask& task, int64_t row, float*)
      : columns(task.vocabulary), first_row(row), rows(task.rows - row < kLanes ? task.rows - row : kLanes) {
    for (int64_t i = 0; i < columns; ++i) {
      student[i] = load_strided((const T*)task.student + row * task.student_stride + i, task.student_stride, rows);
      teacher[i] = load_strided((const T*)task.teacher + row * task.teacher_stride + i, task.teacher_stride, rows);
    }
  }

  int strips() const { return 1; }
  int64_t steps() const { return columns; }

  template <class F>
  void each(int, int64_t, int64_t, F f) const {
    for (int64_t i = 0; i < columns; ++i) f(i, student[i], teacher[i]);
  }

  template <class F>
  void again(int r, int64_t begin, int64_t end, F f) const {
    each(r, begin, end, f);
  }
  static void convert(Pairs, int64_t, Vec, Vec) {}

  Vec present(int64_t, Vec x) const { return x; }

  struct Next {
    void prefetch(int64_t) const {}
  };
  Next next(int) const { return {}; }

  Pairs pairs(int) { return {(float*)kept}; }
  Pairs maxima() { return {}; }

  struct Output {
    Vec* grad;
    void put(int64_t i, Vec g) const { grad[2 * i] = g; }
  };
  Output output(int) { return {kept}; }

  void finish(const KlDivTask& task) const {
    T* grad = (T*)task.grad + first_row * columns;
    for (int64_t i = 0; i < columns; ++i) {
      T lanes[kLanes];
      store(lanes, kept[2 * i]);
      for (int k = 0; k < rows; ++k) grad[k * columns + i] = lanes[k];
    }
  }

  Vec column(int64_t i) const { return splat((float)i); }

  static Vec running_max(const Vec* v) { return v[0]; }
  static Vec fold_max(const Vec* v) { return v[0]; }
  static Vec fold_min(const Vec* v) { return v[0]; }
  static Vec fold_sum(const Vec* v) { return v[0]; }
  static Vec spread(Vec v, int) { return v; }
};

}  // namespace
