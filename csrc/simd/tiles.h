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
    for (int64_t i = begin; i < end; ++i) f(i, load(first(r, i)), load(second(r, i)));
  }
  void convert(int r, int64_t i, Vec x, Vec y) const {
    if (std::is_same<T, float>::value) return;
    store(first(r, i), x);
    store(second(r, i), y);
  }

  // x with the padding of the last partial step replaced by 0.
  Vec present(int64_t i, Vec x) const { return i < full ? x : select(column(i) < splat((float)columns), x, Vec{}); }

  // What comes next: the next block of a long row, or of the next group the counterpart of this row.
  void prefetch(int r, int64_t i) const {
    const int64_t row = N == 1 ? 0 : r + N, step = N == 1 ? i + kBlock : i;
    __builtin_prefetch(student + row * student_stride + step * kLanes);
    __builtin_prefetch(teacher + row * teacher_stride + step * kLanes);
  }

  float* first(int r, int64_t i) const { return kept + 2 * (r * steps() + i) * kLanes; }
  float* second(int r, int64_t i) const { return first(r, i) + kLanes; }
  float* maxima(int64_t begin) const { return kept_maxima + begin / kBlock * 2 * kLanes; }

  void put(int r, int64_t i, Vec g) const {
    T* to = grad + r * columns + i * kLanes;
    if (i < full)
      store(to, g);
    else
      store_tail(to, g, tail);
  }

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
  Vec student[kShortColumns], teacher[kShortColumns], kept[2][kShortColumns];
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
  void convert(int, int64_t, Vec, Vec) const {}

  Vec present(int64_t, Vec x) const { return x; }

  void prefetch(int, int64_t) const {}

  float* first(int, int64_t i) { return (float*)(kept[0] + i); }
  float* second(int, int64_t i) { return (float*)(kept[1] + i); }
  float* maxima(int64_t) { return (float*)kept; }

  void put(int, int64_t i, Vec g) { kept[0][i] = g; }

  void finish(const KlDivTask& task) const {
    T* grad = (T*)task.grad + first_row * columns;
    for (int64_t i = 0; i < columns; ++i) {
      T lanes[kLanes];
      store(lanes, kept[0][i]);
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
