// torch.ops.fastkd.low_rank_mse on the CPU: slices of rows in parallel, each in chunks whose error stays in the cache.
//
// The matrix products are those of the BLAS that torch brings, one thread to a slice; between them one pass makes the
// error, its gradient and the loss of a row. How the rows are cut depends on their number alone, and so do the results.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/matrix.h"
#include "cpu/rows.h"
#include "cpu/squared_error.h"
#include "cpu/tensor.h"
#include "runtime/huge_pages.h"
#include "simd/dispatch.h"

namespace fastkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Slices come in fours, which share out evenly among few threads; each holds its own sums, so there are not too many.
constexpr int64_t kSliceRows = 1024, kMinSliceRows = 128, kMaxSlices = 16;
// Rows of a chunk: more than the cache would ask for where a call of the BLAS costs as much as its work.
constexpr int64_t kChunkRows = 256, kChunkRowsBfloat16 = 1024;
constexpr int64_t kGrain = 1 << 14;  // sums per task

// A buffer of one matrix; empty until rows are given.
struct Buffer {
  std::unique_ptr<char[]> bytes;
  Matrix matrix{};
  Buffer() = default;
  Buffer(int64_t rows, int64_t columns, ScalarType type)
      : bytes(new char[rows * columns * bytes_of(type)]), matrix(Matrix::dense(bytes.get(), rows, columns, type)) {
    prefer_huge_pages(bytes.get(), rows * columns * bytes_of(type));
  }
};

struct Problem {
  Tensor x, target;  // (N, d_in), (N, d_out)
  Matrix down, up;   // (r, d_in), (d_out, r) in the type of the products
  const float* bias;
  const float* scale;  // (N) or null
  float factor;
  const void *given_output, *grad_output;  // (N, d_out) contiguous or null
  void* output;
  float* loss;
  const int64_t* index;  // rows that take part, or null: all
  int64_t items, chunk_rows, slice_rows, slices;
  Dtype dtype;
  ScalarType product;         // type of the operands of the products
  void* grad_x;               // (N, d_in) contiguous or null
  char *down_sums, *up_sums;  // one term of term_type() per slice, or null
  float* bias_sums;

  int64_t d_in() const { return down.columns; }
  int64_t d_out() const { return up.rows; }
  int64_t rank() const { return down.rows; }
  Dtype product_dtype() const { return product == ScalarType::Float ? Dtype::float32 : dtype; }
  bool in_place() const { return product_dtype() == dtype && index == nullptr; }
  // A slice that is one chunk needs no sum of its own: its products are its terms.
  bool sums_chunks() const { return slice_rows > chunk_rows; }
  ScalarType term_type() const { return sums_chunks() ? ScalarType::Float : product; }
  bool any_grad() const { return grad_x || down_sums || up_sums || bias_sums; }
};

char* row(const void* data, int64_t i, int64_t stride, Dtype dtype) {
  return (char*)data + i * stride * (dtype == Dtype::float32 ? 4 : 2);
}

// One thread's buffers, used for one slice of rows after the other.
struct Worker {
  const Problem& p;
  Buffer x, z, error, dz, dx, part;
  char *down_sum, *up_sum;  // the current slice's share of the gradients
  float* bias_sum;

  explicit Worker(const Problem& problem) : p(problem) {
    const int64_t rows = p.chunk_rows;
    if (!p.in_place()) x = Buffer(rows, p.d_in(), p.product);
    z = Buffer(rows, p.rank(), p.product);
    error = Buffer(rows, p.d_out(), p.product);
    if (p.grad_x || p.down_sums) dz = Buffer(rows, p.rank(), p.product);
    if (p.grad_x && !p.in_place()) dx = Buffer(rows, p.d_in(), p.product);
    if (p.product != p.term_type() && (p.down_sums || p.up_sums))
      part = Buffer(p.rank(), std::max(p.d_in(), p.d_out()), p.product);
  }

  Matrix load_x(int64_t begin, int64_t rows) const {
    char* first = row(p.x.data_ptr(), p.index ? 0 : begin, p.x.stride(0), p.dtype);
    if (p.in_place()) return {first, rows, p.d_in(), p.x.stride(0), 1, p.product};
    gather_rows({first, x.matrix.data, p.index ? p.index + begin : nullptr, rows, p.d_in(), p.x.stride(0), p.d_in(),
                 p.dtype, p.product_dtype()});
    return x.matrix.first(rows);
  }

  void store_dx(const Matrix& grad, int64_t begin) const {
    char* first = row(p.grad_x, p.index ? 0 : begin, p.d_in(), p.dtype);
    scatter_rows({grad.data, first, p.index ? p.index + begin : nullptr, grad.rows, p.d_in(), p.d_in(), p.d_in(),
                  p.product_dtype(), p.dtype});
  }

  // Makes the error of a chunk from its prediction, in place, scaled as a gradient.
  void differentiate(const Matrix& e, int64_t begin) const {
    const int64_t first = p.index ? 0 : begin, columns = p.d_out();
    const auto at = [&](const void* data) { return data ? row(data, first, columns, p.dtype) : nullptr; };
    SquaredErrorTask task{};
    task.prediction = p.given_output ? at(p.given_output) : e.data;
    task.bias = p.given_output ? nullptr : p.bias;
    task.target = row(p.target.data_ptr(), first, p.target.stride(0), p.dtype);
    task.scale = p.scale ? p.scale + first : nullptr;
    task.factor = p.factor;
    task.addend = at(p.grad_output);
    task.grad = p.any_grad() ? e.data : nullptr;
    task.output = at(p.output);
    task.loss = p.loss ? p.loss + first : nullptr;
    task.column_sums = bias_sum;
    task.index = p.index ? p.index + begin : nullptr;
    task.columns = columns;
    task.prediction_stride = columns;
    task.target_stride = p.target.stride(0);
    task.dtype = p.dtype;
    task.prediction_dtype = p.given_output ? p.dtype : p.product_dtype();
    task.grad_dtype = p.product_dtype();
    squared_error(task, 0, e.rows);
  }

  // Adds a b to the slice's term, in float32 where there is more than one to add.
  void accumulate(const Matrix& a, const Matrix& b, char* term) const {
    const Matrix sum = Matrix::dense(term, a.rows, b.columns, p.term_type());
    if (!p.sums_chunks()) return multiply(a, b, sum);
    if (p.product == ScalarType::Float) return multiply_add(a, b, sum);
    const Matrix product = Matrix::dense(part.matrix.data, a.rows, b.columns, p.product);
    multiply(a, b, product);
    add_bfloat16((float*)term, product.data, a.rows * b.columns);
  }

  void chunk(int64_t begin, int64_t rows) const {
    const Matrix xs = load_x(begin, rows), zs = z.matrix.first(rows), e = error.matrix.first(rows);
    multiply(xs, p.down.transposed(), zs);
    if (!p.given_output) multiply(zs, p.up.transposed(), e);
    differentiate(e, begin);
    if (up_sum) accumulate(e.transposed(), zs, up_sum);
    if (!p.grad_x && !down_sum) return;
    const Matrix dzs = dz.matrix.first(rows);
    multiply(e, p.up, dzs);
    if (down_sum) accumulate(dzs.transposed(), xs, down_sum);
    if (!p.grad_x) return;
    if (p.in_place()) {
      multiply(dzs, p.down, Matrix::dense(row(p.grad_x, begin, p.d_in(), p.dtype), rows, p.d_in(), p.product));
    } else {
      multiply(dzs, p.down, dx.matrix.first(rows));
      store_dx(dx.matrix.first(rows), begin);
    }
  }

  void run(int64_t slice) {
    const auto share = [&](auto* all, int64_t count) { return all ? all + slice * count : nullptr; };
    down_sum = share(p.down_sums, p.rank() * p.d_in() * bytes_of(p.term_type()));
    up_sum = share(p.up_sums, p.rank() * p.d_out() * bytes_of(p.term_type()));
    bias_sum = share(p.bias_sums, p.d_out());
    const int64_t end = std::min((slice + 1) * p.slice_rows, p.items);
    for (int64_t begin = slice * p.slice_rows; begin < end; begin += p.chunk_rows)
      chunk(begin, std::min(p.chunk_rows, end - begin));
  }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows that take part. Where the output is wanted or has a gradient, those are all.
std::vector<int64_t> compact(const float* scale, int64_t rows) {
  std::vector<int64_t> kept;
  for (int64_t i = 0; i < rows; ++i)
    if (scale[i] != 0.0f) kept.push_back(i);
  return kept;
}

// Terms of the slices as one buffer, zero where they are sums; summed into a tensor of the gradient's type at the end.
struct SliceSums {
  Tensor terms;
  Tensor total;

  SliceSums(const Tensor& like, bool needed, int64_t slices, std::vector<int64_t> shape, ScalarType type,
            ScalarType term_type, bool zeroed)
      : terms(torch::stable::new_empty(like, {0}, term_type)),
        total(torch::stable::new_empty(like, needed ? shape : std::vector<int64_t>{0}, type)) {
    if (!needed) return;
    terms = torch::stable::new_empty(like, {slices, total.numel()}, term_type);
    prefer_huge_pages(terms.mutable_data_ptr(), terms.numel() * terms.element_size());
    if (zeroed) torch::stable::zero_(terms);
  }
  char* data() const { return terms.numel() ? (char*)terms.mutable_data_ptr() : nullptr; }
  void finish() const {
    const SumTask task{terms.data_ptr(), total.mutable_data_ptr(),        terms.numel() ? terms.size(0) : 0,
                       total.numel(),    dtype_of(terms, "low_rank_mse"), dtype_of(total, "low_rank_mse")};
    torch::stable::parallel_for(0, total.numel(), kGrain,
                                [&](int64_t begin, int64_t end) { sum_terms(task, begin, end); });
  }
};

void zero_rows(const Tensor& grad, const std::vector<float>& scale) {
  const int64_t bytes = grad.size(1) * grad.element_size();
  for (size_t i = 0; i < scale.size(); ++i)
    if (scale[i] == 0.0f) std::memset((char*)grad.mutable_data_ptr() + i * bytes, 0, bytes);
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// How the rows are cut depends on their number alone.
void cut(Problem& p) {
  p.slices = std::min({kMaxSlices, 4 * ceil_div(p.items, 4 * kSliceRows), ceil_div(p.items, kMinSliceRows)});
  p.slice_rows = ceil_div(p.items, std::max(p.slices, (int64_t)1));
  p.chunk_rows = std::min(p.slice_rows, p.product == ScalarType::Float ? kChunkRows : kChunkRowsBfloat16);
}

void check(const Tensor& x, const Tensor& down, const Tensor& up, const Tensor& target) {
  STD_TORCH_CHECK(down.size(1) == x.size(1) && up.size(1) == down.size(0) && target.size(0) == x.size(0) &&
                      target.size(1) == up.size(0) && target.scalar_type() == x.scalar_type(),
                  "fastkd::low_rank_mse takes (N, d_in), (r, d_in), (d_out, r) and (N, d_out)");
}

// A tensor like the projection, dense.
std::optional<Tensor> projection(const std::optional<Tensor>& t, const Tensor& target, const char* name) {
  if (!t) return t;
  STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == target.size(0) && t->size(1) == target.size(1) &&
                      t->scalar_type() == target.scalar_type(),
                  "fastkd::low_rank_mse: ", name, " must have the target's shape and dtype");
  return torch::stable::contiguous(*t);
}

Results low_rank_mse(const Tensor& x_in, const Tensor& down_in, const Tensor& up_in, const Tensor& target_in,
                     std::optional<Tensor> bias_in, std::optional<Tensor> valid, std::optional<Tensor> weights,
                     std::optional<Tensor> output_in, std::optional<Tensor> grad_output_in, int64_t reduction,
                     std::optional<Tensor> denominator, bool need_x, bool need_down, bool need_up, bool need_bias,
                     bool need_output) {
  using namespace torch::stable;
  check(x_in, down_in, up_in, target_in);
  const Tensor x = dense_rows(x_in), target = dense_rows(target_in);
  const int64_t rows = x.size(0), d_in = x.size(1), rank = down_in.size(0), d_out = up_in.size(0);
  const Values<float> bias(bias_in, d_out, ScalarType::Float, "bias");
  const auto given_output = projection(output_in, target, "output"),
             grad_output = projection(grad_output_in, target, "grad_output");
  const ScalarType type = x.scalar_type();
  // Half precision would overflow or flush intermediate products, and without instructions for it bfloat16 is slow.
  const ScalarType product = type == ScalarType::BFloat16 && has_bfloat16_pairs() ? type : ScalarType::Float;
  const Tensor down = contiguous(to(down_in, product)), up = contiguous(to(up_in, product));

  const std::vector<float> scale = row_scale(valid, weights, rows);
  const bool all_rows = scale.empty() || need_output || given_output || grad_output;
  const std::vector<int64_t> index = all_rows ? std::vector<int64_t>() : compact(scale.data(), rows);
  const bool skips = !all_rows && (int64_t)index.size() < rows;

  Problem p{x, target, Matrix::of(down), Matrix::of(up)};
  p.dtype = dtype_of(x, "low_rank_mse");
  p.product = product;
  p.bias = bias.data();
  p.scale = scale.empty() ? nullptr : scale.data();
  p.index = skips ? index.data() : nullptr;
  p.items = skips ? index.size() : rows;
  p.given_output = given_output ? given_output->data_ptr() : nullptr;
  p.grad_output = grad_output ? grad_output->data_ptr() : nullptr;
  cut(p);

  const Tensor output = new_empty(x, need_output ? std::vector<int64_t>{rows, d_out} : std::vector<int64_t>{0});
  const Tensor grad_x = need_x ? new_gradient(x) : new_empty(x, {0});
  p.output = need_output ? output.mutable_data_ptr() : nullptr;
  p.grad_x = need_x ? grad_x.mutable_data_ptr() : nullptr;
  const SliceSums sums_down(x, need_down, p.slices, {rank, d_in}, type, p.term_type(), p.sums_chunks());
  const SliceSums sums_up(x, need_up, p.slices, {d_out, rank}, type, p.term_type(), p.sums_chunks());
  const SliceSums sums_bias(x, need_bias, p.slices, {d_out}, ScalarType::Float, ScalarType::Float, true);
  p.down_sums = sums_down.data();
  p.up_sums = sums_up.data();
  p.bias_sums = (float*)sums_bias.data();
  const RowLosses losses(x, rows, reduction, denominator);
  p.loss = losses.data();
  p.factor = (float)(2.0 / d_out * losses.grad_scale(p.dtype));

  if (skips) std::fill_n(p.loss, rows, 0.0f);
  if (skips && need_x) zero_rows(grad_x, scale);
  if (p.items > 0)
    parallel_for(0, p.slices, 1, [&](int64_t begin, int64_t end) {
      Worker worker(p);
      for (int64_t slice = begin; slice < end; ++slice) worker.run(slice);
    });
  for (const SliceSums* sums : {&sums_down, &sums_up, &sums_bias}) sums->finish();
  return {losses.reduced(), grad_x, sums_down.total, sums_up.total, sums_bias.total, output};
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("low_rank_mse", TORCH_BOX(&fastkd::low_rank_mse)); }
