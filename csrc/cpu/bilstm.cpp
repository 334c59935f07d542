// torch.ops.fastkd.bilstm on the CPU: the engine of csrc/runtime on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/tensor.h"
#include "runtime/lstm.h"

namespace fastkd {
namespace {

using torch::stable::Tensor;

class TorchThreads final : public runtime::Threads {
 public:
  int threads() const override { return (int)torch::stable::get_num_threads(); }
  void run(int64_t count, const std::function<void(int64_t)>& f) override {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }
};

const float* values(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(dtype_of(tensor, "bilstm") == Dtype::float32, "fastkd::bilstm: ", name, " must be float32");
  return (const float*)tensor.data_ptr();
}

std::vector<int64_t> lengths_of(const Tensor& lengths, int64_t tokens) {
  STD_TORCH_CHECK(lengths.dim() == 1 && lengths.scalar_type() == torch::headeronly::ScalarType::Long,
                  "fastkd::bilstm: lengths must be (sequences,) int64");
  const int64_t* n = (const int64_t*)lengths.data_ptr();
  const std::vector<int64_t> all(n, n + lengths.numel());
  int64_t left = tokens;
  for (const int64_t length : all) {
    STD_TORCH_CHECK(length >= 0 && length <= left, "fastkd::bilstm: lengths must add up to the tokens of x");
    left -= length;
  }
  STD_TORCH_CHECK(left == 0, "fastkd::bilstm: lengths must add up to the tokens of x");
  return all;
}

Tensor bilstm(const Tensor& x_in, const Tensor& lengths_in, const Tensor& weight_input_in,
              const Tensor& weight_recurrent_in, const Tensor& bias_in) {
  const Tensor x = torch::stable::contiguous(x_in), lengths = torch::stable::contiguous(lengths_in),
               weight_input = torch::stable::contiguous(weight_input_in),
               weight_recurrent = torch::stable::contiguous(weight_recurrent_in),
               bias = torch::stable::contiguous(bias_in);
  STD_TORCH_CHECK(x.dim() == 2 && weight_input.dim() == 3 && weight_recurrent.dim() == 3 && bias.dim() == 2,
                  "fastkd::bilstm: x must be (tokens, inputs), the weights of three dimensions and bias of two");
  const int64_t tokens = x.size(0), inputs = x.size(1), ways = weight_recurrent.size(0),
                hidden = weight_recurrent.size(2);
  STD_TORCH_CHECK(weight_recurrent.size(1) == 4 * hidden && weight_input.size(0) == ways &&
                      weight_input.size(1) == 4 * hidden && weight_input.size(2) == inputs && bias.size(0) == ways &&
                      bias.size(1) == 4 * hidden,
                  "fastkd::bilstm: the weights and bias do not fit x and each other");
  STD_TORCH_CHECK(ways == 1 || ways == 2, "fastkd::bilstm: there is one direction or two");
  std::vector<runtime::Direction> directions;
  std::vector<const runtime::Direction*> pointers;
  for (int64_t way = 0; way < ways; ++way) {
    runtime::Matrix input, recurrent;
    input.values = values(weight_input, "weight_input") + way * 4 * hidden * inputs;
    recurrent.values = values(weight_recurrent, "weight_recurrent") + way * 4 * hidden * hidden;
    input.outputs = recurrent.outputs = 4 * hidden;
    input.inputs = inputs;
    recurrent.inputs = hidden;
    directions.push_back(runtime::make_direction(input, recurrent, values(bias, "bias") + way * 4 * hidden,
                                                 runtime::Precision::float32, way == 1));
  }
  for (const runtime::Direction& direction : directions) pointers.push_back(&direction);
  const Tensor y = torch::stable::new_empty(x, {tokens, ways * hidden});
  runtime::Inputs rows;
  rows.values = values(x, "x");
  rows.stride = inputs;
  TorchThreads threads;
  runtime::run_lstm(pointers, rows, lengths_of(lengths, tokens), (float*)y.mutable_data_ptr(), ways * hidden, threads);
  return y;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("bilstm", TORCH_BOX(&fastkd::bilstm)); }
