// KL of attention maps with its gradient, one key head at a time, compiled once per target.
//
// For a block of query rows both score tiles live in the L2 cache: they become exponentials and then, in place, the
// weighted difference of probabilities, which is multiplied into both gradients. A thread owns its key head, so that no
// two ever add to one gradient.
#include "simd/matmul.h"
//
#include "simd/heads.h"
//
#include "simd/attention_rows.h"

namespace {

// T is the type of the tensors, Unit that of the packed operands.
template <class T, class Unit>
class KeyHead {
 public:
  KeyHead(const AttentionKlDivTask& task, float* scratch)
      : task(task),
        student(task.student),
        teacher(task.teacher),
        averaged(teacher.heads / student.heads),
        rows(block_rows(task)),
        memory(scratch) {
    const int64_t keys = panels(task.keys) * kPanel, all_rows = panels(rows) * kPanel;
    present = take(1, keys).data;
    student_keys = take(keys, student.dim);
    teacher_keys = take(keys, teacher.dim);
    student_panels = take(keys, student.dim).data;
    teacher_panels = take(averaged * keys, teacher.dim).data;
    student_queries = take(all_rows, student.dim);
    teacher_queries = take(rows, teacher.dim);
    paired_keys = take(keys / 2, student.dim);
    paired_queries = take(all_rows / 2, student.dim);
    turned_queries = take(panels(student.dim) * kPanel, rows);
    grad_keys = take(panels(student.dim) * kPanel, task.keys);
    grad_queries = take(rows, student.dim);
    for (Packed* tile : {&student_tile, &teacher_tile, &member_tile}) *tile = take(all_rows, task.keys);
  }

  void run(int64_t b, int64_t key_head) {
    batch = b;
    find_present();
    pack_keys(student, key_head, student_keys, student_panels);
    right_keys = along_rows<Unit>(student_keys, panels(task.keys) * kPanel, student.dim, paired_keys);
    if (task.need_grad) std::memset(grad_keys.data, 0, student.dim * grad_keys.row * sizeof(float));
    const int64_t group = student.heads / student.key_heads;
    for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h) run_head(h);
    if (task.need_grad) put_columns<T>(task.grad_key, batch, key_head, grad_keys, task.keys, student.dim);
  }

 private:
  Packed take(int64_t n, int64_t columns) {
    const Packed taken = {memory, packed_stride(columns)};
    memory += n * taken.row;
    return taken;
  }

  bool exists(int64_t key) const { return !task.key_mask || task.key_mask[batch * task.keys + key]; }
  bool counts(int64_t query) const { return !task.query_mask || task.query_mask[batch * task.queries + query]; }
  Range seen_by(int64_t query) const { return visible(task, query) & existing; }

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
  void pack_keys(const AttentionModel& model, int64_t head, Packed to, float* transposed) {
    for (int64_t j = 0; j < panels(task.keys) * kPanel; ++j) {
      if (j < task.keys && exists(j))
        pack_row<Unit>(row_of<T>(model.key, batch, head, j), model.dim, to.at(j));
      else
        zero_row(model.dim, to.at(j));
    }
    transpose_panels(to, task.keys, units<Unit>(model.dim), transposed);
  }

  float* teacher_panels_of(int64_t member) const {
    return teacher_panels + member * panels(task.keys) * panel_floats(teacher);
  }

  static int64_t panel_floats(const AttentionModel& model) { return kPanel * panels(units<Unit>(model.dim)) * kPanel; }

  void run_head(int64_t head) {
    const int64_t shared = teacher.heads / teacher.key_heads;
    for (int64_t m = 0; m < averaged; ++m)
      pack_keys(teacher, (head * averaged + m) / shared, teacher_keys, teacher_panels_of(m));
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
      put_row(row_of<T>(task.grad_query, batch, head, i), grad_queries.data, student.dim);
  }

  // Queries that do not count may hold NaN and are packed as zeros.
  void scores(const AttentionModel& model, int64_t head, int64_t first, int64_t count, Packed queries,
              const float* transposed, Packed tile) {
    for (int64_t i = 0; i < count; ++i) {
      if (counts(first + i))
        pack_row<Unit>(row_of<T>(model.query, batch, head, first + i), model.dim, queries.at(i));
      else
        zero_row(model.dim, queries.at(i));
    }
    for (int64_t j = block.begin; j < block.end; j += kPanel)
      product<Unit>(count, queries, {(float*)transposed + j / kPanel * panel_floats(model), kPanel},
                    units<Unit>(model.dim), {tile.data + j, tile.row}, false);
  }

  Vec finish(const AttentionModel& model, int64_t head, int64_t query, float* row) const {
    const float* bias = model.bias;
    if (bias) bias += batch * model.bias_batch + head * model.bias_head + query * model.bias_query;
    return finish_scores(row, seen_by(query), model.scale, present, bias, task.keys);
  }

  // The teacher's tile becomes the logarithm of the mean of its heads' probabilities.
  void average_scores(int64_t head, int64_t first, int64_t count) {
    for (int64_t m = 0; m < averaged; ++m) {
      scores(teacher, head * averaged + m, first, count, teacher_queries, teacher_panels_of(m), member_tile);
      for (int64_t i = 0; i < count; ++i) {
        if (!counts(first + i)) continue;
        const Vec top = finish(teacher, head * averaged + m, first + i, member_tile.at(i));
        add_member(member_tile.at(i), teacher_tile.at(i), seen_by(first + i), top, m, averaged);
      }
    }
  }

  // Rows r .. r + count, at most kLanes, so that their folds, logarithms and divisions are taken together.
  void compare(int64_t head, int64_t first, int64_t r, int64_t count) {
    Vec top_s[kLanes] = {}, top_t[kLanes] = {}, sum_s[kLanes] = {}, sum_t[kLanes] = {}, cross[kLanes] = {};
    Vec lacking[kLanes] = {}, valid{}, weight{};
    for (int k = 0; k < count; ++k) {
      const int64_t query = first + r + k;
      if (task.need_grad)
        weight[k] = task.weight[batch * task.weight_batch + head * task.weight_head + query * task.weight_query];
      valid[k] = counts(query);
      if (!valid[k]) continue;
      top_s[k] = finish(student, head, query, student_tile.at(r + k));
      float* row = teacher_tile.at(r + k);
      top_t[k] = averaged == 1 ? finish(teacher, head, query, row) : maxima(row, seen_by(query));
    }
    const Vec max_s = fold_rows(top_s, max_of), max_t = fold_rows(top_t, max_of);
    for (int k = 0; k < count; ++k) {
      if (!valid[k]) continue;
      const RowSums sums = exponentials(student_tile.at(r + k), teacher_tile.at(r + k), seen_by(first + r + k),
                                        max_s[k], max_t[k], student.bias || teacher.bias);
      sum_s[k] = sums.student, sum_t[k] = sums.teacher, cross[k] = sums.cross, lacking[k] = sums.lacking;
    }
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

  // The student's tile becomes the gradient in its raw scores, 0 up to both ends of the block, for products along the
  // rows; for products across them, where pairs are needed, the teacher's does.
  void difference(int64_t first, int64_t r, bool alive, float per_s, float per_t) {
    const float *s = student_tile.at(r), *t = teacher_tile.at(r);
    const Range keys = alive ? aligned(seen_by(first + r), kLanes) : Range{block.end, block.end};
    for (int64_t j = block.begin; j < block.end; j += kLanes) {
      const bool inside = j >= keys.begin && j < keys.end;
      const Vec gradient = inside ? load(s + j) * per_s - load(t + j) * per_t : Vec{};
      put<Unit>(student_tile.at(r), j, gradient);
      if (Unit::kPer == 2) put_across<Unit>(teacher_tile, r, j, gradient);
    }
  }

  void multiply(int64_t head, int64_t first, int64_t count) {
    turn<Unit>(student_queries, count, student.dim, paired_queries, turned_queries);
    const Packed rows = across<Unit>(Unit::kPer == 1 ? student_tile : teacher_tile, count, block.end);
    for (int64_t j = block.begin; j < block.end; j += kPanel)
      product<Unit>(student.dim, turned_queries, {rows.data + j, rows.row}, units<Unit>(count),
                    {grad_keys.data + j, grad_keys.row}, true);
    const int64_t begin = units<Unit>(block.begin), depth = units<Unit>(block.end) - begin;
    for (int64_t c = 0; c < student.dim; c += kPanel)
      product<Unit>(count, {student_tile.data + begin, student_tile.row}, {right_keys.at(begin) + c, right_keys.row},
                    depth, {grad_queries.data + c, grad_queries.row}, false);
    for (int64_t i = 0; i < count; ++i)
      put_row(row_of<T>(task.grad_query, batch, head, first + i), grad_queries.at(i), student.dim);
  }

  const AttentionKlDivTask& task;
  const AttentionModel &student, &teacher;
  const int64_t averaged;  // heads of the teacher for one of the student
  const int64_t rows;
  float* memory;
  float *present, *student_panels, *teacher_panels;
  Packed student_keys, teacher_keys, paired_keys, right_keys, student_queries, teacher_queries, paired_queries,
      turned_queries;
  Packed grad_keys, grad_queries, student_tile, teacher_tile, member_tile;
  int64_t batch = 0;
  Range existing{}, block{};  // keys of the batch element and of the block of queries
};

template <class T, class Unit>
void key_heads(const AttentionKlDivTask& task, int64_t begin, int64_t end, float* scratch) {
  KeyHead<T, Unit> worker(task, scratch);
  for (int64_t unit = begin; unit < end; ++unit)
    worker.run(unit / task.student.key_heads, unit % task.student.key_heads);
}

}  // namespace

// Units begin..end of (batch, student's key heads).
static void attention_kl_div(const AttentionKlDivTask& task, int64_t begin, int64_t end, float* scratch) {
  switch (task.dtype) {
    case Dtype::float32:
      return key_heads<float, Singles>(task, begin, end, scratch);
    case Dtype::bfloat16:
#if defined(FASTKD_AVX512)
      if (has_bfloat16_tiles()) {
        const TileScope tiles;
        return key_heads<BFloat16, Tiles>(task, begin, end, scratch);
      }
      if (has_bfloat16_pairs()) return key_heads<BFloat16, Pairs>(task, begin, end, scratch);
#endif
      return key_heads<BFloat16, Singles>(task, begin, end, scratch);
    case Dtype::float16:
      return key_heads<Half, Singles>(task, begin, end, scratch);
  }
}
