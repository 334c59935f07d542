// The steps of a BiLSTM layer in training, from the input's part of the gates, and their gradient.
#include "cpu/lstm_steps.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/sequences.h"
#include "runtime/lstm.h"
#include "simd/dispatch.h"

#define FASTKD_SOURCE "simd/lstm_steps.h"
#include "simd/foreach_target.h"

namespace fastkd {
namespace {

using torch::stable::Tensor;

constexpr int64_t kLongestVector = 16;

// Checked sizes of gates (tokens, directions, 4 hidden), weight (directions, 4 hidden, hidden) and lengths.
struct Layer {
  const char* op;
  int64_t tokens, directions, hidden;
  Dtype dtype;
  std::vector<int64_t> lengths;

  Layer(const Tensor& gates, const Tensor& lengths_in, const Tensor& weight, const char* op)
      : op(op), tokens(gates.size(0)), directions(weight.size(0)), hidden(weight.size(2)), dtype(dtype_of(gates, op)) {
    STD_TORCH_CHECK(weight.dim() == 3 && weight.size(1) == 4 * hidden && (directions == 1 || directions == 2),
                    "fastkd::", op, ": weight must be (1 or 2 directions, 4 * hidden, hidden)");
    STD_TORCH_CHECK(hidden % kLongestVector == 0, "fastkd::", op, ": hidden must be a multiple of 16");
    STD_TORCH_CHECK(gates.dim() == 3 && gates.size(1) == directions && gates.size(2) == 4 * hidden, "fastkd::", op,
                    ": gates must be (tokens, directions, 4 * hidden) to fit weight");
    lengths = lengths_of(torch::stable::contiguous(lengths_in), tokens, op);
  }

  std::vector<int64_t> sizes() const { return {tokens, directions * hidden}; }

  // A tensor of `sizes()`.
  const float* values(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == tokens && tensor.size(1) == directions * hidden,
                    "fastkd::", op, ": ", name, " must be (tokens, directions * hidden)");
    return floats(tensor, op, name);
  }

  // A direction's columns of a tensor like gates.
  const void* gates_of(const Tensor& tensor, int64_t way) const {
    return (const char*)tensor.data_ptr() + way * 4 * hidden * (dtype == Dtype::float32 ? 4 : 2);
  }

  // f(direction, what all steps know, zeroed memory) for groups of sequences, over the threads; `weight` is
  // (directions, outputs, inputs).
  template <class F>
  void run(const Tensor& weight, F f) const {
    const float* values = floats(weight, op, "weight");
    std::vector<runtime::Panels> packed;
    for (int64_t way = 0; way < directions; ++way) {
      runtime::Matrix matrix;
      matrix.outputs = weight.size(1), matrix.inputs = weight.size(2);
      matrix.values = values + way * matrix.outputs * matrix.inputs;
      packed.push_back(runtime::pack_linear(matrix, nullptr, runtime::Precision::float32));
    }
    TorchThreads threads;
    runtime::each_group(directions, lengths, threads, [&](int64_t way, const runtime::Sequences& some) {
      const LstmSteps steps{&packed[way], some.begin, some.length, some.count, hidden, directions, way == 1, dtype};
      const int64_t count = some.count * FASTKD_PICK(lstm_floats)(steps);
      const runtime::Scratch memory(count * (int64_t)sizeof(float));
      std::fill_n(memory.as<float>(), count, 0.0f);
      f(way, steps, memory.as<float>());
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> lstm_forward(const Tensor& gates_in, const Tensor& lengths, const Tensor& weight) {
  const Tensor gates = torch::stable::contiguous(gates_in);
  const Layer layer(gates, lengths, weight, "lstm_forward");
  const Tensor states = torch::stable::new_empty(weight, layer.sizes()),
               cells = torch::stable::new_empty(weight, layer.sizes()), activations = torch::stable::empty_like(gates);
  float *y = (float*)states.mutable_data_ptr(), *c = (float*)cells.mutable_data_ptr();
  layer.run(torch::stable::contiguous(weight), [&](int64_t way, const LstmSteps& steps, float* memory) {
    const int64_t unit = way * layer.hidden;
    FASTKD_PICK(lstm_forward)
    ({steps, layer.gates_of(gates, way), (void*)layer.gates_of(activations, way), c + unit, y + unit}, memory);
  });
  return {states, cells, activations};
}

Tensor lstm_backward(const Tensor& grad_in, const Tensor& lengths, const Tensor& weight, const Tensor& cells_in,
                     const Tensor& activations_in) {
  const Tensor grad = torch::stable::contiguous(grad_in), cells = torch::stable::contiguous(cells_in),
               activations = torch::stable::contiguous(activations_in);
  const Layer layer(activations, lengths, weight, "lstm_backward");
  const float *g = layer.values(grad, "grad"), *c = layer.values(cells, "cells");
  const Tensor grad_gates = torch::stable::empty_like(activations);
  const Tensor turned = torch::stable::contiguous(torch::stable::transpose(weight, 1, 2));
  layer.run(turned, [&](int64_t way, const LstmSteps& steps, float* memory) {
    const int64_t unit = way * layer.hidden;
    FASTKD_PICK(lstm_backward)
    ({steps, layer.gates_of(activations, way), c + unit, g + unit, (void*)layer.gates_of(grad_gates, way)}, memory);
  });
  return grad_gates;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("lstm_forward", TORCH_BOX(&fastkd::lstm_forward));
  m.impl("lstm_backward", TORCH_BOX(&fastkd::lstm_backward));
}
