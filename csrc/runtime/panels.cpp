#include "runtime/panels.h"

#include <cmath>

namespace fastkd::runtime {
namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

uint32_t bfloat16(float x) { return (bits_of(x) + 0x7fff + ((bits_of(x) >> 16) & 1)) >> 16; }

// Two weights in 32 bits. The upper one is used with the lower one's bits below it, so it is chosen such that the value
// with those bits is nearest: that saves masking them off in every product.
uint32_t pair(float lower, float upper) {
  const uint32_t low = bfloat16(lower), high = bits_of(upper) >> 16;
  uint32_t best = high << 16 | low;
  for (const uint32_t candidate : {high + 1, high - (high & 0x7fff ? 1 : 0)}) {
    const uint32_t bits = candidate << 16 | low;
    if (std::fabs(float_of(bits) - upper) < std::fabs(float_of(best) - upper)) best = bits;
  }
  return best;
}

struct Place {
  int64_t panel, group, lane;
  Place(const Panels& p, int64_t column)
      : panel(column / p.width()), group(column % p.width() / p.group), lane(column % p.group) {}
};

void pack_float32(Panels& p, const float* row, int64_t column) {
  const Place at(p, column);
  float* to = p.weights.as<float>() + at.panel * p.inputs * p.width() + at.group * p.group + at.lane;
  for (int64_t k = 0; k < p.inputs; ++k) to[k * p.width()] = row[k];
}

void pack_int8(Panels& p, const int8_t* row, int64_t column) {
  const Place at(p, column);
  int64_t sum = 0;
  int8_t* to = p.weights.as<int8_t>() + at.panel * p.panel_bytes() + (at.group * p.group + at.lane) * 4;
  for (int64_t k = 0; k < p.inputs; ++k) {
    to[k / 4 * p.width() * 4 + k % 4] = row[k];
    sum += row[k];
  }
  p.sum[column] = (float)sum;
}

// A column and that of the next group at once, of which either row may be null.
void pack_bfloat16(Panels& p, const float* even, const float* odd, int64_t column) {
  const Place at(p, column);
  const int64_t step = p.width() / 2;
  uint32_t* to = p.weights.as<uint32_t>() + at.panel * p.inputs * step + at.group / 2 * p.group + at.lane;
  for (int64_t k = 0; k < p.inputs; ++k) to[k * step] = pair(even ? even[k] : 0, odd ? odd[k] : 0);
}

}  // namespace

Panels pack(const Matrix& matrix, const float* bias, Precision precision, int64_t panels,
            const std::function<int64_t(int64_t)>& place) {
  Panels p;
  p.precision = precision;
  p.inputs = matrix.inputs;
  p.panels = panels;
  p.weights = Memory(panels * p.panel_bytes());
  p.bias.assign(p.columns(), 0.0f);
  if (precision == Precision::int8) p.scale.assign(p.columns(), 0.0f), p.sum.assign(p.columns(), 0.0f);
  std::vector<const float*> rows(p.columns(), nullptr);
  for (int64_t o = 0; o < matrix.outputs; ++o) {
    const int64_t column = place(o);
    if (bias) p.bias[column] = bias[o];
    if (precision == Precision::int8) {
      pack_int8(p, matrix.bytes + o * matrix.inputs, column);
      p.scale[column] = matrix.scale[o];
    } else {
      rows[column] = matrix.values + o * matrix.inputs;
    }
  }
  for (int64_t column = 0; column < p.columns(); ++column) {
    if (precision == Precision::bfloat16 && column % (2 * p.group) < p.group)
      pack_bfloat16(p, rows[column], rows[column + p.group], column);
    if (precision == Precision::float32 && rows[column] != nullptr) pack_float32(p, rows[column], column);
  }
  return p;
}

Panels pack_linear(const Matrix& matrix, const float* bias, Precision precision) {
  const int64_t width = kGroups * lanes();
  return pack(matrix, bias, precision, (matrix.outputs + width - 1) / width, [](int64_t o) { return o; });
}

Panels pack_gates(const Matrix& matrix, const float* bias, Precision precision) {
  const int64_t hidden = matrix.outputs / kGroups, group = lanes();
  return pack(matrix, bias, precision, (hidden + group - 1) / group, [hidden, group](int64_t o) {
    const int64_t gate = o / hidden, unit = o % hidden;
    return (unit / group * kGroups + gate) * group + unit % group;
  });
}

}  // namespace fastkd::runtime
