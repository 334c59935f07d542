// KL of attention maps with its gradient, one key head at a time, compiled once per target.
//
// For a block of query rows both score tiles live in the L2 cache: they become exponentials and then, in place, the
// weighted difference of probabilities, which is multiplied into both gradients. A thread owns its key head, so that no
// two ever add to one gradient.
#include "simd/matmul.h"

namespace {

constexpr float kLowest = -1e30f;
constexpr int64_t kDepth = 64;  // rows of a packed matrix that stay in the L1 cache while a block passes over them

struct Range {
  int64_t begin, end;
};

// Keys that a query sees by its position; query i stands at position i + keys - queries.
inline Range visible(const AttentionKlDivTask& task, int64_t query) {
  const int64_t position = query + task.keys - task.queries;
  Range keys = {0, task.keys};
  if (task.window) keys = {std::max<int64_t>(0, position - task.window + 1), position + task.window};
  if (task.causal) keys.end = position + 1;
  keys.end = std::min(keys.end, task.keys);
  return {keys.begin, std::max(keys.begin, keys.end)};
}

inline Range operator&(Range a, Range b) {
  const int64_t begin = std::max(a.begin, b.begin);
  return {begin, std::max(begin, std::min(a.end, b.end))};
}

inline Range aligned(Range r, int64_t step) {
  return r.begin == r.end ? r : Range{r.begin / step * step, (r.end + step - 1) / step * step};
}

template <class T>
const T* row_of(const Heads& x, int64_t b, int64_t h, int64_t i) {
  return (const T*)x.data + b * x.batch + h * x.head + i * x.token;
}

template <class T>
void put_row(const Heads& x, int64_t b, int64_t h, int64_t i, const float* from, int64_t n) {
  T* to = (T*)x.data + b * x.batch + h * x.head + i * x.token;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(to + j, load(from + j));
  if (j < n) store_tail(to + j, load(from + j), n - j);
}

inline Vec sum_of(Vec a, Vec b) { return a + b; }

template <class T>
class KeyHead {
 public:
  KeyHead(const AttentionKlDivTask& task, float* scratch)
      : task(task),
        student(task.student),
        teacher(task.teacher),
        averaged(teacher.heads / student.heads),
        rows(block_rows(task)),
        memory(scratch) {
    const int64_t keys = panels(task.keys) * kPanel, wide_s = packed_stride(student.dim);
    const int64_t wide_t = packed_stride(teacher.dim);
    present = take(keys);
    student_keys = {take(keys * wide_s), wide_s};
    grad_keys = {take(keys * wide_s), wide_s};
    student_panels = take(keys * wide_s);
    teacher_panels = take(averaged * keys * wide_t);
    few_teacher_keys = {take(kPanel * wide_t), wide_t};
    student_queries = {take(rows * wide_s), wide_s};
    teacher_queries = {take(rows * wide_t), wide_t};
    grad_queries = {take(rows * wide_s), wide_s};
    for (Packed* tile : {&student_tile, &teacher_tile, &member_tile})
      *tile = {take(rows * packed_stride(task.keys)), packed_stride(task.keys)};
  }

  void run(int64_t b, int64_t key_head) {
    batch = b;
    find_present();
    for (int64_t j = 0; j < panels(task.keys); ++j) {
      const Packed some = {student_keys.data + j * kPanel * student_keys.row, student_keys.row};
      pack_panel(student, key_head, j, some, student_panels);
    }
    if (task.need_grad) std::memset(grad_keys.data, 0, panels(task.keys) * kPanel * grad_keys.row * sizeof(float));
    const int64_t group = student.heads / student.key_heads;
    for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h) run_head(h);
    for (int64_t j = 0; task.need_grad && j < task.keys; ++j)
      put_row<T>(task.grad_key, batch, key_head, j, grad_keys.data + j * grad_keys.row, student.dim);
  }

 private:
  float* take(int64_t floats) {
    float* taken = memory;
    memory += (floats + 15) / 16 * 16;
    return taken;
  }

  bool exists(int64_t key) const { return !task.key_mask || task.key_mask[batch * task.keys + key]; }
  bool counts(int64_t query) const { return !task.query_mask || task.query_mask[batch * task.queries + query]; }

  // 0 for a key that exists, -inf for one that does not, and the range outside which none does.
  void find_present() {
    existing = {task.keys, 0};
    for (int64_t j = 0; j < panels(task.keys) * kPanel; ++j) {
      const bool here = j < task.keys && exists(j);
      present[j] = here ? 0.0f : -kInfinity;
      if (here) existing = {std::min(existing.begin, j), j + 1};
    }
    existing.begin = std::min(existing.begin, existing.end);
  }

  // Keys that do not exist may hold NaN and are packed as zeros.
  void pack_panel(const AttentionModel& model, int64_t head, int64_t panel, Packed to, float* transposed) {
    for (int64_t k = 0, j = panel * kPanel; k < kPanel; ++k, ++j) {
      if (j < task.keys && exists(j))
        pack_row(row_of<T>(model.key, batch, head, j), model.dim, to.data + k * to.row);
      else
        zero_row(model.dim, to.data + k * to.row);
    }
    transpose_panels(to, kPanel, model.dim, transposed + panel * panel_floats(model));
  }

  static int64_t panel_floats(const AttentionModel& model) { return kPanel * panels(model.dim) * kPanel; }

  float* teacher_panels_of(int64_t member) {
    return teacher_panels + member * panels(task.keys) * panel_floats(teacher);
  }

  void run_head(int64_t head) {
    const int64_t shared = teacher.heads / teacher.key_heads;
    for (int64_t m = 0; m < averaged; ++m)
      for (int64_t j = 0; j < panels(task.keys); ++j)
        pack_panel(teacher, (head * averaged + m) / shared, j, few_teacher_keys, teacher_panels_of(m));
    for (int64_t i = 0; i < task.queries; i += rows) run_block(head, i, std::min(rows, task.queries - i));
  }

  void run_block(int64_t head, int64_t first, int64_t count) {
    const Range seen = Range{visible(task, first).begin, visible(task, first + count - 1).end} & existing;
    block = aligned(seen, kPanel);
    bool any_counts = false;
    for (int64_t i = first; i < first + count; ++i) any_counts |= counts(i);
    if (block.begin == block.end || !any_counts) return skip(head, first, count);
    scores(student, head, first, count, student_queries, student_panels, student_tile);
    if (averaged == 1)
      scores(teacher, head, first, count, teacher_queries, teacher_panels, teacher_tile);
    else
      average_scores(head, first, count);
    for (int64_t r = 0; r < count; r += kLanes) compare(head, first, r, std::min<int64_t>(kLanes, count - r));
    if (task.need_grad) multiply(head, first, count);
  }

  void skip(int64_t head, int64_t first, int64_t count) {
    std::memset(task.loss + (batch * student.heads + head) * task.queries + first, 0, count * sizeof(float));
    if (!task.need_grad) return;
    zero_row(student.dim, grad_queries.data);
    for (int64_t i = first; i < first + count; ++i)
      put_row<T>(task.grad_query, batch, head, i, grad_queries.data, student.dim);
  }

  // Queries that do not count may hold NaN and are packed as zeros.
  void scores(const AttentionModel& model, int64_t head, int64_t first, int64_t count, Packed queries,
              const float* transposed, Packed tile) {
    for (int64_t i = 0; i < count; ++i) {
      if (counts(first + i))
        pack_row(row_of<T>(model.query, batch, head, first + i), model.dim, queries.data + i * queries.row);
      else
        zero_row(model.dim, queries.data + i * queries.row);
    }
    for (int64_t j = block.begin; j < block.end; j += kPanel)
      product(count, {queries.data, queries.row, 1}, {(float*)transposed + j / kPanel * panel_floats(model), kPanel},
              model.dim, {tile.data + j, tile.row}, false);
    for (int64_t i = 0; i < count; ++i)
      if (counts(first + i)) finish_scores(model, head, first + i, tile.data + i * tile.row);
  }

  Range seen_by(int64_t query) const { return visible(task, query) & existing; }

  // Scale, bias and -inf where there is no key to see.
  void finish_scores(const AttentionModel& model, int64_t head, int64_t query, float* row) {
    const Range keys = seen_by(query), whole = aligned(keys, kLanes);
    const Vec scale = splat(model.scale);
    std::fill(row + whole.begin, row + keys.begin, -kInfinity);
    std::fill(row + keys.end, row + whole.end, -kInfinity);
    const float* bias = model.bias;
    if (bias) bias += batch * model.bias_batch + head * model.bias_head + query * model.bias_query;
    for (int64_t j = whole.begin; j < whole.end; j += kLanes) {
      Vec x = fma(load(row + j), scale, load(present + j));
      if (bias) x += task.keys - j >= kLanes ? load(bias + j) : load_tail(bias + j, task.keys - j);
      store(row + j, x);
    }
  }

  // The teacher's tile becomes the logarithm of the mean of its heads' probabilities.
  void average_scores(int64_t head, int64_t first, int64_t count) {
    for (int64_t m = 0; m < averaged; ++m) {
      scores(teacher, head * averaged + m, first, count, teacher_queries, teacher_panels_of(m), member_tile);
      for (int64_t i = 0; i < count; ++i)
        if (counts(first + i))
          add_member(seen_by(first + i), member_tile.data + i * member_tile.row,
                     teacher_tile.data + i * teacher_tile.row, m);
    }
  }

  // Adds a head's probabilities to their sum, which is -inf where no head allows the key, and ends with its logarithm.
  void add_member(Range keys, float* member, float* total, int64_t m) {
    keys = aligned(keys, kLanes);
    const Vec none = splat(-kInfinity), lowest = splat(kLowest);
    Vec top = lowest, sum{};
    for (int64_t j = keys.begin; j < keys.end; j += kLanes) top = max(load(member + j), top);
    top = fold_lanes(top, [](Vec a, Vec b) { return max(a, b); });
    for (int64_t j = keys.begin; j < keys.end; j += kLanes) {
      const Vec x = load(member + j), e = exp2((max(lowest, x) - top) * kLog2e);
      store(member + j, select(x == none, x, e));
      sum += e;
    }
    const Vec per = 1.0f / ((float)averaged * fold_lanes(sum, sum_of));
    for (int64_t j = keys.begin; j < keys.end; j += kLanes) {
      const Vec x = load(member + j), before = m == 0 ? none : load(total + j);
      const Vec p = select(before == none, Vec{}, before) + x * per;
      Vec after = select(x == none, before, p);
      if (m + 1 == averaged) {
        const Vec logarithm = select(after == after, log(max(splat(1e-37f), after)), after);
        after = select(after == none, none, select(after < 1e-37f, lowest, logarithm));
      }
      store(total + j, after);
    }
  }

  // Rows r .. r + count, at most kLanes, so that their folds, logarithms and divisions are taken together.
  void compare(int64_t head, int64_t first, int64_t r, int64_t count) {
    Vec top_s[kLanes] = {}, top_t[kLanes] = {}, sum_s[kLanes] = {}, sum_t[kLanes] = {}, cross[kLanes] = {};
    Vec lacking[kLanes] = {}, valid{}, weight{};
    for (int k = 0; k < count; ++k) {
      valid[k] = counts(first + r + k);
      if (valid[k]) maxima(first, r + k, &top_s[k], &top_t[k]);
      if (task.need_grad)
        weight[k] =
            task.weight[batch * task.weight_batch + head * task.weight_head + (first + r + k) * task.weight_query];
    }
    const auto larger = [](Vec a, Vec b) { return max(a, b); };
    const Vec max_s = fold_rows(top_s, larger), max_t = fold_rows(top_t, larger);
    for (int k = 0; k < count; ++k)
      if (valid[k]) exponentials(first, r + k, max_s[k], max_t[k], &sum_s[k], &sum_t[k], &cross[k], &lacking[k]);
    const Vec all_s = fold_rows(sum_s, sum_of), all_t = fold_rows(sum_t, sum_of);
    // A sum of NaN is not that of an empty row, whose maximum looks the same.
    const VecInt empty_s = (max_s == kLowest) & (all_s == all_s), empty_t = (max_t == kLowest) & (all_t == all_t);
    const VecInt infinite = (fold_rows(lacking, sum_of) > 0.0f) | (empty_s ^ empty_t);
    const VecInt alive = (valid > 0.0f) & ~infinite & ~empty_s;
    Vec loss = fold_rows(cross, sum_of) / all_t + (log(all_s) - log(all_t));
    loss = select(alive, loss, select((valid > 0.0f) & infinite, splat(kInfinity), Vec{}));
    std::memcpy(task.loss + (batch * student.heads + head) * task.queries + first + r, &loss, count * sizeof(float));
    if (!task.need_grad) return;
    const Vec per_s = weight * student.scale / all_s, per_t = weight * student.scale / all_t;
    for (int k = 0; k < count; ++k) difference(first, r + k, alive[k] != 0, per_s[k], per_t[k]);
  }

  void maxima(int64_t first, int64_t r, Vec* top_s, Vec* top_t) {
    const float *s = student_tile.data + r * student_tile.row, *t = teacher_tile.data + r * teacher_tile.row;
    const Range keys = aligned(seen_by(first + r), kLanes);
    Vec max_s = splat(kLowest), max_t = splat(kLowest);
    for (int64_t j = keys.begin; j < keys.end; j += kLanes) {
      max_s = max(load(s + j), max_s);
      max_t = max(load(t + j), max_t);
    }
    *top_s = max_s;
    *top_t = max_t;
  }

  void exponentials(int64_t first, int64_t r, float max_s, float max_t, Vec* sum_s, Vec* sum_t, Vec* cross,
                    Vec* lacking) {
    float *s = student_tile.data + r * student_tile.row, *t = teacher_tile.data + r * teacher_tile.row;
    const Range keys = aligned(seen_by(first + r), kLanes);
    const bool biased = student.bias || teacher.bias;
    const Vec lowest = splat(kLowest), none = splat(-kInfinity);
    Vec all_s{}, all_t{}, crossed{};
    for (int64_t j = keys.begin; j < keys.end; j += kLanes) {
      const Vec raw_s = load(s + j), raw_t = load(t + j);
      if (biased) *lacking += select((raw_s == none) & (raw_t > none), splat(1.0f), Vec{});
      const Vec x_s = max(lowest, raw_s) - max_s, x_t = max(lowest, raw_t) - max_t;
      const Vec e_s = exp2(x_s * kLog2e), e_t = exp2(x_t * kLog2e);
      all_s += e_s;
      all_t += e_t;
      crossed = fma(e_t, x_t - x_s, crossed);
      store(s + j, e_s);
      store(t + j, e_t);
    }
    *sum_s = all_s;
    *sum_t = all_t;
    *cross = crossed;
  }

  // The student's tile becomes the gradient in its raw scores, 0 up to both ends of the block.
  void difference(int64_t first, int64_t r, bool alive, float per_s, float per_t) {
    float* s = student_tile.data + r * student_tile.row;
    const float* t = teacher_tile.data + r * teacher_tile.row;
    const Range keys = alive ? aligned(seen_by(first + r), kLanes) : Range{block.end, block.end};
    std::fill(s + block.begin, s + keys.begin, 0.0f);
    std::fill(s + keys.end, s + block.end, 0.0f);
    for (int64_t j = keys.begin; j < keys.end; j += kLanes) store(s + j, load(s + j) * per_s - load(t + j) * per_t);
  }

  void multiply(int64_t head, int64_t first, int64_t count) {
    const Packed& grad = student_tile;
    const int64_t keys = std::min(block.end, task.keys) - block.begin;
    for (int64_t c = 0; c < student.dim; c += kPanel) {
      for (int64_t j = block.begin; j < block.end; j += kDepth)
        product(count, {grad.data + j, grad.row, 1}, {student_keys.data + j * student_keys.row + c, student_keys.row},
                std::min(kDepth, block.end - j), {grad_queries.data + c, grad_queries.row}, j > block.begin);
      product(keys, {grad.data + block.begin, 1, grad.row}, {student_queries.data + c, student_queries.row}, count,
              {grad_keys.data + block.begin * grad_keys.row + c, grad_keys.row}, true);
    }
    for (int64_t i = 0; i < count; ++i)
      put_row<T>(task.grad_query, batch, head, first + i, grad_queries.data + i * grad_queries.row, student.dim);
  }

  const AttentionKlDivTask& task;
  const AttentionModel &student, &teacher;
  const int64_t averaged;  // heads of the teacher for one of the student
  const int64_t rows;
  float* memory;
  float *present, *student_panels, *teacher_panels;
  Packed student_keys, grad_keys, few_teacher_keys, student_queries, teacher_queries, grad_queries;
  Packed student_tile, teacher_tile, member_tile;
  int64_t batch = 0;
  Range existing{}, block{};  // keys of the batch element and of the block of queries
};

template <class T>
void key_heads(const AttentionKlDivTask& task, int64_t begin, int64_t end, float* scratch) {
  KeyHead<T> worker(task, scratch);
  for (int64_t unit = begin; unit < end; ++unit)
    worker.run(unit / task.student.key_heads, unit % task.student.key_heads);
}

}  // namespace

// Units begin..end of (batch, student's key heads).
static void attention_kl_div(const AttentionKlDivTask& task, int64_t begin, int64_t end, float* scratch) {
  switch (task.dtype) {
    case Dtype::float32:
      return key_heads<float>(task, begin, end, scratch);
    case Dtype::bfloat16:
      return key_heads<BFloat16>(task, begin, end, scratch);
    case Dtype::float16:
      return key_heads<Half>(task, begin, end, scratch);
  }
}
