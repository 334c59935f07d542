// A matrix packed once, at load, for many products y = W x + b. Free of torch and Python, like everything in this
// folder.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "runtime/memory.h"
#include "simd/dispatch.h"

namespace fastkd::runtime {

enum class Precision { float32, bfloat16, int8 };

constexpr int64_t kGroups = 4;

// A panel holds the weights of four groups of columns (outputs), or of an LSTM's four gates of some units; a group is a
// vector of this CPU's. They lie input by input, so that a product streams them once:
//   float32   [panel][input][group][lane]
//   bfloat16  [panel][input][group / 2][lane], each of 32 bits: the odd group above the even one
//   int8      [panel][input / 4][group][lane][4], symmetric, with a scale per column
struct Panels {
  int64_t group = lanes();  // columns
  Precision precision = Precision::float32;
  int64_t inputs = 0, panels = 0;
  Memory weights;
  std::vector<float> bias;   // per column
  std::vector<float> scale;  // int8: of the integer products, per column
  std::vector<float> sum;    // int8: of the integer weights, per column: what a zero point of the input has to lose

  int64_t width() const { return kGroups * group; }  // of a panel, in columns
  int64_t columns() const { return panels * width(); }
  int64_t depth() const { return precision == Precision::int8 ? (inputs + 3) / 4 : inputs; }  // steps of the inner loop
  int64_t panel_bytes() const { return depth() * width() * (precision == Precision::bfloat16 ? 2 : 4); }
};

// Weights (outputs, inputs) as a file has them: float, or int8 with a scale per output.
struct Matrix {
  const float* values = nullptr;
  const int8_t* bytes = nullptr;
  const float* scale = nullptr;
  int64_t outputs = 0, inputs = 0;
};

// Output o becomes column place(o), and columns that get none are 0; bias (outputs) may be null. A matrix of bytes
// needs Precision::int8, one of values any other.
Panels pack(const Matrix& matrix, const float* bias, Precision precision, int64_t panels,
            const std::function<int64_t(int64_t)>& place);

// Outputs in their order.
Panels pack_linear(const Matrix& matrix, const float* bias, Precision precision);

// The four gates (i, f, g, o) of hidden units, as torch stacks them, so that a panel has all four of its units.
Panels pack_gates(const Matrix& matrix, const float* bias, Precision precision);

}  // namespace fastkd::runtime
