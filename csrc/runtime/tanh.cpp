#include "runtime/tanh.h"

#include <cmath>

namespace fastkd::runtime {

// Each parabola meets tanh at the Chebyshev nodes of its segment.
TanhTable::TanhTable() {
  for (int s = 0; s < 16; ++s) {
    const double low = s == 0 ? 0 : (s - 0.5) * kWidth, high = (s + 0.5) * kWidth;
    double x[3], y[3];
    for (int i = 0; i < 3; ++i) {
      x[i] = (low + high) / 2 - (high - low) / 2 * std::cos((2 * i + 1) * std::acos(-1.0) / 6);
      y[i] = std::tanh(x[i]);
    }
    const double first = (y[1] - y[0]) / (x[1] - x[0]), second = (y[2] - y[1]) / (x[2] - x[1]);
    const double a = (second - first) / (x[2] - x[0]), b = first - a * (x[0] + x[1]);
    square[s] = (float)a;
    linear[s] = (float)b;
    constant[s] = (float)(y[0] - x[0] * (b + a * x[0]));
  }
}

const TanhTable& tanh_table() {
  static const TanhTable table;
  return table;
}

}  // namespace fastkd::runtime
