// Rows of scores: which keys a query sees, and the passes that make exponentials, sums and differences of them. A pass
// goes over whole vectors, so a row is -inf between the ends of what its query sees and those of the vectors.
namespace {

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

// Scale, bias and -inf where there is no key to see; returns the maximum of each lane. ``present`` is 0 for a key that
// exists, else -inf.
inline Vec finish_scores(float* row, Range keys, float by, const float* present, const float* bias, int64_t tokens) {
  const Range whole = aligned(keys, kLanes);
  const Vec scale = splat(by);
  Vec top = splat(kLowest);
  std::fill(row + whole.begin, row + keys.begin, -kInfinity);
  std::fill(row + keys.end, row + whole.end, -kInfinity);
  for (int64_t j = whole.begin; j < whole.end; j += kLanes) {
    Vec x = fma(load(row + j), scale, load(present + j));
    if (bias) x += tokens - j >= kLanes ? load(bias + j) : load_tail(bias + j, tokens - j);
    store(row + j, x);
    top = max(x, top);
  }
  return top;
}

// The scores of one of ``count`` heads become probabilities, which are added to the sum of those before; where no head
// allows a key it is -inf. After the last head the sum becomes the logarithm of the mean.
inline void add_member(float* member, float* total, Range keys, Vec top, int64_t index, int64_t count) {
  keys = aligned(keys, kLanes);
  const Vec none = splat(-kInfinity), lowest = splat(kLowest);
  top = fold_lanes(top, max_of);
  Vec sum{};
  for (int64_t j = keys.begin; j < keys.end; j += kLanes) {
    const Vec x = load(member + j), e = exp2((max(lowest, x) - top) * kLog2e);
    store(member + j, select(x == none, x, e));
    sum += e;
  }
  const Vec per = 1.0f / ((float)count * fold_lanes(sum, sum_of));
  for (int64_t j = keys.begin; j < keys.end; j += kLanes) {
    const Vec x = load(member + j), before = index == 0 ? none : load(total + j);
    const Vec p = select(before == none, Vec{}, before) + x * per;
    Vec after = select(x == none, before, p);
    if (index + 1 == count) {
      const Vec logarithm = select(after == after, log(max(splat(1e-37f), after)), after);
      after = select(after == none, none, select(after < 1e-37f, lowest, logarithm));
    }
    store(total + j, after);
  }
}

inline Vec maxima(const float* row, Range keys) {
  keys = aligned(keys, kLanes);
  Vec top = splat(kLowest);
  for (int64_t j = keys.begin; j < keys.end; j += kLanes) top = max(load(row + j), top);
  return top;
}

// What is known of a row once its scores are exponentials, lane by lane.
struct RowSums {
  Vec student, teacher, cross;
  Vec lacking;  // above 0 where the student excludes what the teacher allows
};

inline RowSums exponentials(float* s, float* t, Range keys, float max_s, float max_t, bool biased) {
  keys = aligned(keys, kLanes);
  const Vec lowest = splat(kLowest), none = splat(-kInfinity);
  RowSums sums{};
  for (int64_t j = keys.begin; j < keys.end; j += kLanes) {
    const Vec raw_s = load(s + j), raw_t = load(t + j);
    if (biased) sums.lacking += select((raw_s == none) & (raw_t > none), splat(1.0f), Vec{});
    const Vec x_s = max(lowest, raw_s) - max_s, x_t = max(lowest, raw_t) - max_t;
    const Vec e_s = exp2(x_s * kLog2e), e_t = exp2(x_t * kLog2e);
    sums.student += e_s;
    sums.teacher += e_t;
    sums.cross = fma(e_t, x_t - x_s, sums.cross);
    store(s + j, e_s);
    store(t + j, e_t);
  }
  return sums;
}

}  // namespace
