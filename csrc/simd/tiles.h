// How rows of a student and a teacher meet the vectors, compiled once per target.
//
// A tile is kLanes lanes wide. Long rows take one tile each, its lanes being neighbouring columns (LongRow); short rows
// share one, its lanes being neighbouring rows (ShortRows). Both run the same arithmetic: they differ only in how a
// step is loaded and in whether a statistic is folded across the lanes.
namespace {

template <class T>
struct LongRow {
  static constexpr int64_t kRows = 1;
  const T *student, *teacher;
  T* grad;
  int64_t full, tail;  // whole steps, and columns in the last partial one

  LongRow(const KlDivTask& task, int64_t row, const T* first)
      : student(first + row * task.student_stride),
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

  // x with the padding of the last partial step replaced by 0.
  Vec present(int64_t i, Vec x) const {
    return i < full ? x : select(column(i) < splat((float)(full * kLanes + tail)), x, Vec{});
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

  void finish(T*) const {}

  Vec column(int64_t i) const {
    Vec v;
    for (int k = 0; k < kLanes; ++k) v[k] = (float)(i * kLanes + k);
    return v;
  }

  static Vec all_max(Vec v) { return splat(fold_max(v)); }
  static Vec at_max(Vec v, Vec of) {
    int best = 0;
    for (int k = 1; k < kLanes; ++k) best = v[k] > v[best] ? k : best;
    return splat(of[best]);
  }
  static Vec all_min(Vec v) { return splat(fold_min(v)); }
  static Vec all_sum(Vec v) { return splat(fold_sum(v)); }
};

struct ShortRows {
  static constexpr int64_t kRows = kLanes;
  static constexpr int64_t kColumns = 256;  // longest row that is worth transposing: both tiles then fit L1
  float student[kColumns][kLanes];
  mutable float teacher[kColumns][kLanes];  // the gradient takes its place, step by step
  int64_t columns, first, rows;

  template <class T>
  ShortRows(const KlDivTask& task, int64_t row, const T* student_logits)
      : columns(task.vocabulary), first(row), rows(task.rows - row < kLanes ? task.rows - row : kLanes) {
    gather(student, student_logits + row * task.student_stride, task.student_stride);
    gather(teacher, (const T*)task.teacher + row * task.teacher_stride, task.teacher_stride);
  }

  template <class T>
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

  Vec present(int64_t, Vec x) const { return x; }

  void prefetch(int64_t) const {}

  void put(int64_t i, Vec g) const { store(teacher[i], g); }

  template <class T>
  void finish(T* all) const {
    T* grad = all + first * columns;
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
  static Vec at_max(Vec, Vec of) { return of; }
  static Vec all_min(Vec v) { return v; }
  static Vec all_sum(Vec v) { return v; }
};

}  // namespace
