// The steps of an LSTM in training and their gradient, compiled once per target; see cpu/lstm_steps.h.
//
// As in simd/lstm.h the sequences that run at a step are the first few. A step is a product for all of them, and then
// what is left of each, row by row: side by side in the tensors, their rows would fall into one set of the cache.
#include "simd/gates.h"
#include "simd/panels.h"

namespace {

using runtime::Panels;

// to (rows, columns) = from (rows, inputs) times the packed weights
inline void product(const Panels& weight, const float* from, int64_t rows, float* to) {
  const int64_t columns = weight.columns();
  multiply<Precision::float32, false>(weight, {from, rows, weight.inputs, nullptr},
                                      [&](int64_t row, int64_t panel, const Vec(&y)[kGroups]) {
                                        float* at = to + row * columns + panel * kPanel;
                                        for (int g = 0; g < kGroups; ++g) store(at + g * kLanes, y[g]);
                                      });
}

// The state after a step; `sums` is the state before times the weights.
template <class T>
void advance(const LstmForward& task, int64_t token, const float* sums, float* cell, float* hidden) {
  const int64_t units = task.hidden;
  const T* gates = (const T*)task.gates + token * task.gates_stride();
  T* kept = (T*)task.activations + token * task.gates_stride();
  float *cells = task.cells + token * task.stride(), *states = task.states + token * task.stride();
  for (int64_t u = 0; u < units; u += kLanes) {
    const auto gate = [&](int g) { return load(gates + g * units + u) + load(sums + g * units + u); };
    const Vec input = sigmoid(gate(0)), forget = sigmoid(gate(1)), fresh = tanh(gate(2)), output = sigmoid(gate(3));
    const Vec state = fma(forget, load(cell + u), input * fresh), h = output * tanh(state);
    const Vec activations[] = {input, forget, fresh, output};
    for (int g = 0; g < kGroups; ++g) store(kept + g * units + u, activations[g]);
    store(cell + u, state);
    store(cells + u, state);
    store(hidden + u, h);
    store(states + u, h);
  }
}

// The gradient of a sequence's gates at a step: into grad_gates, and into `row` for the product that follows.
template <class T>
void retreat(const LstmBackward& task, int64_t sequence, int64_t step, const float* grad_hidden, float* grad_cell,
             float* row) {
  const int64_t token = task.token(sequence, step), units = task.hidden;
  const T* kept = (const T*)task.activations + token * task.gates_stride();
  T* out = (T*)task.grad_gates + token * task.gates_stride();
  const float *cell = task.cells + token * task.stride(), *grad = task.grad + token * task.stride();
  const float* before = step > 0 ? task.cells + task.token(sequence, step - 1) * task.stride() : nullptr;
  for (int64_t u = 0; u < units; u += kLanes) {
    const auto activation = [&](int g) { return load(kept + g * units + u); };
    const Vec input = activation(0), forget = activation(1), fresh = activation(2), output = activation(3);
    const Vec squashed = tanh(load(cell + u)), old = before ? load(before + u) : Vec{};
    const Vec of_hidden = load(grad + u) + load(grad_hidden + u);
    const Vec of_cell = fma(of_hidden * output, 1.0f - squashed * squashed, load(grad_cell + u));
    const Vec gates[] = {of_cell * fresh * input * (1.0f - input), of_cell * old * forget * (1.0f - forget),
                         of_cell * input * (1.0f - fresh * fresh), of_hidden * squashed * output * (1.0f - output)};
    for (int g = 0; g < kGroups; ++g) {
      store(out + g * units + u, gates[g]);
      store(row + g * units + u, gates[g]);
    }
    store(grad_cell + u, of_cell * forget);
  }
}

template <class T>
void forward(const LstmForward& task, float* memory) {
  const int64_t units = task.hidden, columns = task.weight->columns();
  float *cell = memory, *hidden = cell + task.sequences * units, *sums = hidden + task.sequences * units;
  for (int64_t step = 0; step < task.count(); ++step) {
    const int64_t n = task.running(step);
    if (step > 0) product(*task.weight, hidden, n, sums);
    for (int64_t i = 0; i < n; ++i)
      advance<T>(task, task.token(i, step), sums + i * columns, cell + i * units, hidden + i * units);
  }
}

template <class T>
void backward(const LstmBackward& task, float* memory) {
  const int64_t units = task.hidden, columns = task.weight->columns();
  float *grad_cell = memory, *rows = grad_cell + task.sequences * units,
        *grad_hidden = rows + task.sequences * 4 * units;
  for (int64_t step = task.count() - 1; step >= 0; --step) {
    const int64_t n = task.running(step);
    for (int64_t i = 0; i < n; ++i)
      retreat<T>(task, i, step, grad_hidden + i * columns, grad_cell + i * units, rows + i * 4 * units);
    if (step > 0) product(*task.weight, rows, n, grad_hidden);
  }
}

}  // namespace

// Floats of memory for a sequence; the memory must be zero.
static int64_t lstm_floats(const LstmSteps& task) { return 5 * task.hidden + task.weight->columns(); }

static void lstm_forward(const LstmForward& task, float* memory) {
  switch (task.dtype) {
    case Dtype::float32:
      return forward<float>(task, memory);
    case Dtype::bfloat16:
      return forward<BFloat16>(task, memory);
    case Dtype::float16:
      return forward<Half>(task, memory);
  }
}

static void lstm_backward(const LstmBackward& task, float* memory) {
  switch (task.dtype) {
    case Dtype::float32:
      return backward<float>(task, memory);
    case Dtype::bfloat16:
      return backward<BFloat16>(task, memory);
    case Dtype::float16:
      return backward<Half>(task, memory);
  }
}
