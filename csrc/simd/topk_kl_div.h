// Divergence from a teacher of whom some columns are known, with its gradient, compiled once per target.
//
// A row becomes one of outcomes, whose divergence and gradient are those of kl_div: the listed columns and, as one
// more, the rest of the vocabulary, with T log(sum of e^(z / T)) over it for a logit. The sum leaves the listed columns
// out from the start, since what remains of a difference of sums would be rounding where the listed columns have nearly
// all the mass. The rest's exponentials are kept in the cache; its gradient is one number times each of them.
#include "simd/kl_div.h"

namespace {

// The columns of a row that are not listed, and their exponentials, each block's from its own running maximum.
template <class T>
class Rest {
 public:
  float top, sum;  // maximum, 0 where nothing exists; sum of e^((z - top) / T), 0 there too

  Rest(const T* row, int64_t columns, const int64_t* ids, const int64_t* ids_end, float inverse_t, float* scratch)
      : columns(columns), kept(scratch), maxima(scratch + padded(columns)), scale(splat(inverse_t * kLog2e)) {
    while (ids < ids_end && *ids < 0) ++ids;
    Vec most = splat(-kInfinity), reference{}, total{};
    for (int64_t begin = 0; begin < columns; begin += kRestColumns) {
      const int64_t end = end_of(begin);
      Vec above = copy(row, begin, end, most);
      if (ids < ids_end && *ids < end) {
        for (; ids < ids_end && *ids < end; ++ids) kept[*ids] = -kInfinity;
        above = most;
        for (int64_t i = begin; i < end; i += kLanes) above = max(load(kept + i), above);
      }
      most = above;
      const Vec before = reference;
      reference = zero_if_none(most);
      total *= power(before, reference);
      store(maxima + begin / kRestColumns * kLanes, reference);
      total += exponentials(row, begin, end, reference);
    }
    const Vec all = zero_if_none(fold_lanes(most, [](Vec a, Vec b) { return max(a, b); }));
    top = all[0];
    total *= power(reference, all);
    sum = fold_lanes(total, [](Vec a, Vec b) { return a + b; })[0];
  }

  // T log(sum of e^((z - top) / T))
  float logit(float temperature) const {
    return sum == 0 ? -kInfinity : sum != sum ? sum : temperature * log(splat(sum))[0];
  }

  // grad = per * e^((z - top) / T)
  void put(T* grad, float per) const {
    for (int64_t begin = 0; begin < columns; begin += kRestColumns) {
      const int64_t end = end_of(begin), whole = begin + (end - begin) / kLanes * kLanes;
      const Vec factor = per * power(load(maxima + begin / kRestColumns * kLanes), splat(top));
      for (int64_t i = begin; i < whole; i += kLanes) store(grad + i, load(kept + i) * factor);
      if (whole < end) store_tail(grad + whole, load(kept + whole) * factor, end - whole);
    }
  }

 private:
  const int64_t columns;
  float *kept, *maxima;
  const Vec scale;

  int64_t end_of(int64_t begin) const { return begin + kRestColumns < columns ? begin + kRestColumns : columns; }

  // e^((from - to) / T) of a reference and a later one. A lane that has met nothing refers to 0, which may lie higher.
  Vec power(Vec from, Vec to) const { return exp2(min(Vec{}, (from - to) * scale)); }

  // Keeps the block's logits, -inf beyond the last column; their maximum in each lane.
  Vec copy(const T* row, int64_t begin, int64_t end, Vec most) {
    const int64_t whole = begin + (end - begin) / kLanes * kLanes;
    const auto keep = [&](int64_t i, Vec x) {
      store(kept + i, x);
      most = max(x, most);
    };
    for (int64_t i = begin; i < whole; i += kLanes) keep(i, load(row + i));
    if (whole < end) keep(whole, load_tail(row + whole, end - whole));
    return most;
  }

  // The block's logits become exponentials; their sum in each lane.
  Vec exponentials(const T* row, int64_t begin, int64_t end, Vec reference) {
    Vec sum{};
    for (int64_t i = begin; i < end; i += kLanes) {
      __builtin_prefetch(row + i + kRestColumns);
      const Vec e = exp2((load(kept + i) - reference) * scale);
      store(kept + i, e);
      sum += e;
    }
    return sum;
  }
};

template <class T>
class TopkRow {
 public:
  TopkRow(const TopkKlDivTask& task, int64_t row, float* scratch)
      : task(task),
        row(row),
        student((const T*)task.student + row * task.student_stride),
        ids(task.ids + row * task.k),
        temperature(task.row_temperature ? task.row_temperature[row] : task.temperature),
        rest_scratch(scratch),
        outcomes(scratch + (rest_floats(task.vocabulary) + 15) / 16 * 16),
        teacher(outcomes + outcome_floats(task.outcomes)),
        slopes(teacher + outcome_floats(task.outcomes)),
        inner_scratch(slopes + outcome_floats(task.outcomes)) {}

  void run() {
    if (task.valid && !task.valid[row]) {
      task.loss[row] = 0;
      if (task.grad) std::memset(grad(), 0, task.vocabulary * sizeof(T));
      return;
    }
    if (task.outcomes == task.k) {
      gather(0);
      diverge();
      if (task.grad) std::memset(grad(), 0, task.vocabulary * sizeof(T));
    } else {
      const Rest<T> rest(student, task.vocabulary, ids, ids + task.k, 1.0f / temperature, rest_scratch);
      gather(rest.top);
      outcomes[task.k] = rest.logit(temperature);
      if (rest.sum == 0) teacher[task.k] = -kInfinity;
      diverge();
      if (task.grad) rest.put(grad(), rest.sum == 0 ? 0 : slopes[task.k] / rest.sum);
    }
    for (int64_t j = 0; task.grad && j < task.k; ++j)
      if (ids[j] >= 0) store_tail(grad() + ids[j], splat(slopes[j]), 1);
  }

 private:
  const TopkKlDivTask& task;
  const int64_t row;
  const T* student;
  const int64_t* ids;
  const float temperature;
  float *rest_scratch, *outcomes, *teacher, *slopes, *inner_scratch;

  T* grad() const { return (T*)task.grad + row * task.vocabulary; }

  // Both models' outcomes, the student's counted from `origin`, so that an offset cancels before anything is rounded.
  void gather(float origin) {
    std::memcpy(teacher, task.teacher + row * task.outcomes, task.outcomes * sizeof(float));
    for (int64_t j = 0; j < task.k; ++j) outcomes[j] = ids[j] < 0 ? -kInfinity : to_float(student[ids[j]]) - origin;
  }

  void diverge() {
    const float weight = task.row_weight ? task.row_weight[row] : 1.0f;
    KlDivTask inner{};
    inner.student = outcomes, inner.teacher = teacher, inner.grad = task.grad ? slopes : nullptr;
    inner.loss = task.loss + row;
    inner.rows = 1, inner.vocabulary = inner.student_stride = inner.teacher_stride = task.outcomes;
    inner.temperature = temperature, inner.beta = task.beta, inner.grad_scale = weight * task.grad_scale;
    inner.scale_by_temperature = task.scale_by_temperature;
    inner.dtype = Dtype::float32, inner.divergence = task.divergence;
    kl_div(inner, 0, 1, inner_scratch);
    task.loss[row] *= weight;
  }
};

template <class T>
void topk_rows(const TopkKlDivTask& task, int64_t begin, int64_t end, float* scratch) {
  for (int64_t row = begin; row < end; ++row) TopkRow<T>(task, row, scratch).run();
}

}  // namespace

static void topk_kl_div(const TopkKlDivTask& task, int64_t begin, int64_t end, float* scratch) {
  switch (task.dtype) {
    case Dtype::float32:
      return topk_rows<float>(task, begin, end, scratch);
    case Dtype::bfloat16:
      return topk_rows<BFloat16>(task, begin, end, scratch);
    case Dtype::float16:
      return topk_rows<Half>(task, begin, end, scratch);
  }
}
