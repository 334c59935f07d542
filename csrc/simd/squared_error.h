// Squared error of rows with its gradient, and the conversions around it, compiled once per target.
//
// The sums of squares are folded every kBlock columns and carried on in double, so that a row may be a whole matrix.
namespace {

constexpr int64_t kBlock = 1024;

// The first n < kLanes values, the other lanes 0.
template <class T>
Vec load_first(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

// Calls f(column, get, put) for each vector of columns begin..end, the last of which may be partial.
template <class F>
void each_vector(int64_t begin, int64_t end, F f) {
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes)
    f(j, [](const auto* p) { return load(p); }, [](auto* p, Vec v) { store(p, v); });
  if (const int64_t n = end - j; n > 0)
    f(j, [n](const auto* p) { return load_first(p, n); }, [n](auto* p, Vec v) { store_tail(p, v, n); });
}

template <class Prediction, class T, class Grad>
void squared_error_row(const SquaredErrorTask& task, int64_t i) {
  const int64_t row = task.index ? task.index[i] : i, columns = task.columns;
  const auto* prediction = (const Prediction*)task.prediction + i * task.prediction_stride;
  const auto* target = (const T*)task.target + row * task.target_stride;
  const auto* addend = task.addend ? (const T*)task.addend + row * columns : nullptr;
  auto* grad = task.grad ? (Grad*)task.grad + i * columns : nullptr;
  auto* output = task.output ? (T*)task.output + row * columns : nullptr;
  const float* bias = task.bias;
  float* column_sums = task.column_sums;
  const float scale = task.scale ? task.scale[row] : 1.0f;
  const bool counts = scale != 0.0f;  // a row that does not may hold anything, NaN too
  const Vec slope = splat(task.factor * scale);
  double total = 0.0;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    Vec squares{};
    each_vector(begin, begin + kBlock < columns ? begin + kBlock : columns, [&](int64_t j, auto get, auto put) {
      Vec value = get(prediction + j);
      if (bias) value += get(bias + j);
      if (output) put(output + j, value);
      Vec error{};
      if (counts) error = value - get(target + j);
      squares = fma(error, error, squares);
      if (grad == nullptr) return;
      Vec g = counts ? slope * error : Vec{};
      if (addend) g += get(addend + j);
      put(grad + j, g);
      if (column_sums) put(column_sums + j, get(column_sums + j) + g);
    });
    total += fold_lanes(squares, [](Vec a, Vec b) { return a + b; })[0];
  }
  if (task.loss) task.loss[row] = (float)(counts ? scale * total / (double)columns : 0.0);
}

template <class T>
void squared_error_rows(const SquaredErrorTask& task, int64_t begin, int64_t end) {
  const bool wide_prediction = task.prediction_dtype == Dtype::float32, wide_grad = task.grad_dtype == Dtype::float32;
  const auto run = wide_prediction ? (wide_grad ? squared_error_row<float, T, float> : squared_error_row<float, T, T>)
                                   : (wide_grad ? squared_error_row<T, T, float> : squared_error_row<T, T, T>);
  for (int64_t i = begin; i < end; ++i) run(task, i);
}

template <class From, class To>
void move_row(const From* from, To* to, int64_t columns) {
  each_vector(0, columns, [&](int64_t j, auto get, auto put) { put(to + j, get(from + j)); });
}

template <class From, class To>
void move_all_rows(const MoveRowsTask& task, bool scatter) {
  for (int64_t i = 0; i < task.rows; ++i) {
    const int64_t other = task.index ? task.index[i] : i;
    move_row((const From*)task.from + (scatter ? i : other) * task.from_stride,
             (To*)task.to + (scatter ? other : i) * task.to_stride, task.columns);
  }
}

template <class T>
void move_rows_of(const MoveRowsTask& task, bool scatter) {
  const bool from_wide = task.from_dtype == Dtype::float32, to_wide = task.to_dtype == Dtype::float32;
  const auto run = from_wide ? (to_wide ? move_all_rows<float, float> : move_all_rows<float, T>)
                             : (to_wide ? move_all_rows<T, float> : move_all_rows<T, T>);
  run(task, scatter);
}

template <class From, class To>
void sum_into(const SumTask& task, int64_t begin, int64_t end) {
  each_vector(begin, end, [&](int64_t j, auto get, auto put) {
    Vec sum{};
    for (int64_t k = 0; k < task.terms; ++k) sum += get((const From*)task.from + k * task.count + j);
    put((To*)task.to + j, sum);
  });
}

template <class T>
void sum_into_either(const SumTask& task, int64_t begin, int64_t end) {
  const bool from_wide = task.from_dtype == Dtype::float32, to_wide = task.to_dtype == Dtype::float32;
  const auto run = from_wide ? (to_wide ? sum_into<float, float> : sum_into<float, T>)
                             : (to_wide ? sum_into<T, float> : sum_into<T, T>);
  run(task, begin, end);
}

template <class T>
void add_to(float* sums, const T* terms, int64_t count) {
  each_vector(0, count, [&](int64_t j, auto get, auto put) { put(sums + j, get(sums + j) + get(terms + j)); });
}

}  // namespace

static void squared_error(const SquaredErrorTask& task, int64_t begin, int64_t end) {
  switch (task.dtype) {
    case Dtype::float32:
      return squared_error_rows<float>(task, begin, end);
    case Dtype::bfloat16:
      return squared_error_rows<BFloat16>(task, begin, end);
    case Dtype::float16:
      return squared_error_rows<Half>(task, begin, end);
  }
}

static void move_rows(const MoveRowsTask& task, bool scatter) {
  switch (task.from_dtype == Dtype::float32 ? task.to_dtype : task.from_dtype) {
    case Dtype::float32:
      return move_rows_of<float>(task, scatter);
    case Dtype::bfloat16:
      return move_rows_of<BFloat16>(task, scatter);
    case Dtype::float16:
      return move_rows_of<Half>(task, scatter);
  }
}

static void sum_terms(const SumTask& task, int64_t begin, int64_t end) {
  switch (task.from_dtype == Dtype::float32 ? task.to_dtype : task.from_dtype) {
    case Dtype::float32:
      return sum_into_either<float>(task, begin, end);
    case Dtype::bfloat16:
      return sum_into_either<BFloat16>(task, begin, end);
    case Dtype::float16:
      return sum_into_either<Half>(task, begin, end);
  }
}

static void add_bfloat16(float* sums, const void* terms, int64_t count) { add_to(sums, (const BFloat16*)terms, count); }
