// tanh by 16 parabolas, for precisions whose own error is far above the 4e-4 of these.
#pragma once

namespace fastkd::runtime {

// Segment s covers |x| in [(s - 1/2) width, (s + 1/2) width): tanh(|x|) = constant[s] + x linear[s] + x² square[s].
struct TanhTable {
  static constexpr float kWidth = 0.3f;
  alignas(64) float constant[16], linear[16], square[16];
  TanhTable();
};

const TanhTable& tanh_table();

}  // namespace fastkd::runtime
