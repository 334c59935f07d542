// The baseline kernel of kl_div against the textbook formula in double, for CPUs that only an emulator has.
#include "cpu/kl_div.h"

#include <random>
#include <vector>

#include "check.h"

#define FASTKD_SOURCE "simd/kl_div.h"
#include "simd/foreach_target.h"

using namespace fastkd;

namespace {

constexpr int64_t kRows = 7;
constexpr float kTemperatures[kRows] = {0.5f, 1, 2, 3, 0.7f, 1.5f, 4};
constexpr bool kValid[kRows] = {true, true, false, true, true, true, true};
constexpr double kBeta = 0.3, kWeight = 0.5;

struct Format {
  Dtype dtype;
  const char* name;
  double epsilon;
  double (*round)(double);
};

const Format kFormats[] = {
    {Dtype::float32, "float32", 0x1p-23, [](double x) { return (double)(float)x; }},
    {Dtype::bfloat16, "bfloat16", 0x1p-7, rounded_to_bfloat16},
    {Dtype::float16, "float16", 0x1p-10, rounded_to_half},
};

std::vector<double> softmax(const double* z, int64_t n, double temperature) {
  double top = z[0], sum = 0;
  for (int64_t i = 1; i < n; ++i) top = std::fmax(top, z[i]);
  std::vector<double> p(n);
  for (int64_t i = 0; i < n; ++i) sum += p[i] = std::exp((z[i] - top) / temperature);
  for (double& x : p) x /= sum;
  return p;
}

// T² · divergence + weight · cross-entropy of one row, and its gradient.
double textbook(Divergence divergence, const double* s, const double* t, int64_t n, double temperature, int64_t label,
                std::vector<double>& grad) {
  const std::vector<double> p_s = softmax(s, n, temperature), p_t = softmax(t, n, temperature), p = softmax(s, n, 1);
  std::vector<double> ratio(n);
  double loss = 0, mean = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double m = kBeta * p_t[i] + (1 - kBeta) * p_s[i];
    ratio[i] = std::log(p_s[i] / (divergence == Divergence::jsd ? m : p_t[i]));
    mean += p_s[i] * ratio[i];
    if (divergence == Divergence::forward) loss -= p_t[i] * ratio[i];
    if (divergence == Divergence::reverse) loss += p_s[i] * ratio[i];
    if (divergence == Divergence::jsd) loss += kBeta * p_t[i] * std::log(p_t[i] / m) + (1 - kBeta) * p_s[i] * ratio[i];
  }
  grad.resize(n);
  for (int64_t i = 0; i < n; ++i) {
    const double slope = divergence == Divergence::forward ? p_s[i] - p_t[i] : p_s[i] * (ratio[i] - mean);
    grad[i] = temperature * slope * (divergence == Divergence::jsd ? 1 - kBeta : 1) + kWeight * (p[i] - (i == label));
  }
  return temperature * temperature * loss - kWeight * std::log(p[label]);
}

void put(const Format& format, void* memory, int64_t i, double x) {
  if (format.dtype == Dtype::float32) {
    ((float*)memory)[i] = (float)x;
  } else {
    uint16_t bits = 0;  // the values are exact, so the encoding can be found by its decoding
    const auto decode = format.dtype == Dtype::float16 ? decode_half : decode_bfloat16;
    for (int bit = 15; bit-- > 0;)
      if (decode(bits | 1 << bit) <= std::fabs(x)) bits |= 1 << bit;
    ((uint16_t*)memory)[i] = bits | (x < 0) << 15;
  }
}

double get(const Format& format, const void* memory, int64_t i) {
  if (format.dtype == Dtype::float32) return ((const float*)memory)[i];
  return (format.dtype == Dtype::float16 ? decode_half : decode_bfloat16)(((const uint16_t*)memory)[i]);
}

void check(const Format& format, Divergence divergence, int64_t n) {
  const int64_t stride = n + 3;
  std::mt19937 random((unsigned)n);
  std::normal_distribution<double> normal(0, 3);
  std::vector<double> exact[2];
  std::vector<float> memory[2], grad(kRows * n, -1), loss(kRows);
  for (int model = 0; model < 2; ++model) {
    exact[model].resize(kRows * stride);
    memory[model].resize(kRows * stride);
    for (int64_t i = 0; i < kRows * stride; ++i)
      put(format, memory[model].data(), i, exact[model][i] = format.round(normal(random)));
  }
  int64_t labels[kRows];
  for (int64_t row = 0; row < kRows; ++row) labels[row] = (row * 5 + 2) % n;

  KlDivTask task{};
  task.student = memory[0].data(), task.teacher = memory[1].data();
  task.grad = grad.data(), task.loss = loss.data();
  task.rows = kRows, task.vocabulary = n, task.student_stride = task.teacher_stride = stride;
  task.row_temperature = kTemperatures, task.valid = kValid, task.labels = labels;
  task.beta = (float)kBeta, task.cross_entropy_weight = (float)kWeight, task.grad_scale = 1;
  task.scale_by_temperature = true, task.dtype = format.dtype, task.divergence = divergence;
  std::vector<float> scratch(scratch_floats(n) + 16);
  baseline::kl_div(task, 0, kRows, scratch.data() + (64 - (uintptr_t)scratch.data() % 64) / 4);

  for (int64_t row = 0; row < kRows; ++row) {
    std::vector<double> slopes(n);
    double wanted = 0;
    if (kValid[row])
      wanted = textbook(divergence, &exact[0][row * stride], &exact[1][row * stride], n, kTemperatures[row],
                        labels[row], slopes);
    const double slack = (1 + std::fabs(wanted) + kTemperatures[row] * kTemperatures[row]) * 0x1p-19;
    expect(std::fabs(loss[row] - wanted) <= slack, format.name, "loss", loss[row], wanted);
    for (int64_t i = 0; i < n; ++i) {
      const double got = get(format, grad.data(), row * n + i);
      const double allowed = slack + format.epsilon * std::fabs(slopes[i]);
      expect(std::fabs(got - slopes[i]) <= allowed, format.name, "gradient", got, slopes[i]);
    }
  }
}

}  // namespace

int main() {
  for (const Format& format : kFormats)
    for (Divergence divergence : {Divergence::forward, Divergence::reverse, Divergence::jsd})
      for (int64_t n : {1, 2, 3, 4, 5, 17, 24, 25, 64, 257, 511, 512, 513, 514, 1000}) check(format, divergence, n);
  std::puts("baseline");
  return failures > 0;
}
