// torch.ops.fastkd.bilstm on the CPU: the engine of csrc/runtime on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/sequences.h"
#include "runtime/lstm.h"

namespace fastkd {
namespace {

using torch::stable::Tensor;

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
    input.values = floats(weight_input, "bilstm", "weight_input") + way * 4 * hidden * inputs;
    recurrent.values = floats(weight_recurrent, "bilstm", "weight_recurrent") + way * 4 * hidden * hidden;
    input.outputs = recurrent.outputs = 4 * hidden;
    input.inputs = inputs;
    recurrent.inputs = hidden;
    directions.push_back(runtime::make_direction(input, recurrent, floats(bias, "bilstm", "bias") + way * 4 * hidden,
                                                 runtime::Precision::float32, way == 1));
  }
  for (const runtime::Direction& direction : directions) pointers.push_back(&direction);
  const Tensor y = torch::stable::new_empty(x, {tokens, ways * hidden});
  runtime::Inputs rows;
  rows.values = floats(x, "bilstm", "x");
  rows.stride = inputs;
  TorchThreads threads;
  runtime::run_lstm(pointers, rows, lengths_of(lengths, tokens, "bilstm"), (float*)y.mutable_data_ptr(), ways * hidden,
                    threads);
  return y;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("bilstm", TORCH_BOX(&fastkd::bilstm)); }
