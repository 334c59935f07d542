// The baseline kernel of topk_kl_div against the textbook formula in double, for CPUs that only an emulator has.
#include "cpu/topk_kl_div.h"

#include <random>
#include <vector>

#include "check.h"

#define FASTKD_SOURCE "simd/topk_kl_div.h"
#include "simd/foreach_target.h"

using namespace fastkd;

namespace {

constexpr int64_t kRows = 3;
constexpr float kTemperatures[kRows] = {0.5f, 1, 3};

// T² · KL of one row's outcomes, and its gradient: the rest of the student's columns are one outcome where `rest` says.
double textbook(const float* s, const float* t, const std::vector<int64_t>& ids, int64_t n, double temperature,
                bool rest, std::vector<double>& grad) {
  std::vector<bool> listed(n);
  for (int64_t id : ids) listed[id] = true;
  double sum = 0, sum_t = 0, loss = 0, left = 0;
  for (int64_t i = 0; i < n; ++i)
    if (rest || listed[i]) sum += std::exp(s[i] / temperature);
  const int64_t k = (int64_t)ids.size(), outcomes = k + rest;
  for (int64_t j = 0; j < outcomes; ++j) sum_t += std::exp(t[j] / temperature);
  grad.assign(n, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    if (!rest && !listed[i]) continue;
    grad[i] = temperature * std::exp(s[i] / temperature) / sum;
    if (!listed[i]) left += grad[i] / temperature;
  }
  for (int64_t j = 0; j < outcomes; ++j) {
    const double p = std::exp(t[j] / temperature) / sum_t, q = j < k ? grad[ids[j]] / temperature : left;
    loss += p * std::log(p / q);
    if (j < k)
      grad[ids[j]] -= temperature * p;
    else
      for (int64_t i = 0; i < n; ++i)
        if (!listed[i]) grad[i] *= 1 - p / q;
  }
  return temperature * temperature * loss;
}

void check(int64_t n, int64_t k, bool rest) {
  std::mt19937 random((unsigned)n);
  std::normal_distribution<float> normal(0, 3);
  const int64_t stride = n + 3;
  std::vector<float> student(kRows * stride), teacher(kRows * (k + rest)), grad(kRows * n, -1), loss(kRows);
  for (float& x : student) x = normal(random);
  for (float& x : teacher) x = normal(random);
  std::vector<int64_t> ids;
  for (int64_t row = 0; row < kRows; ++row)
    for (int64_t j = 0; j < k; ++j) ids.push_back((j * n + row) / k);

  TopkKlDivTask task{};
  task.student = student.data(), task.teacher = teacher.data(), task.ids = ids.data();
  task.grad = grad.data(), task.loss = loss.data();
  task.rows = kRows, task.vocabulary = n, task.k = k, task.student_stride = stride, task.outcomes = k + rest;
  task.row_temperature = kTemperatures, task.grad_scale = 1, task.scale_by_temperature = true;
  task.dtype = Dtype::float32, task.divergence = Divergence::forward;
  std::vector<float> scratch(scratch_floats(n, k + rest) + 16);
  baseline::topk_kl_div(task, 0, kRows, scratch.data() + (64 - (uintptr_t)scratch.data() % 64) / 4);

  for (int64_t row = 0; row < kRows; ++row) {
    std::vector<double> slopes;
    const std::vector<int64_t> listed(ids.begin() + row * k, ids.begin() + (row + 1) * k);
    const double wanted =
        textbook(&student[row * stride], &teacher[row * (k + rest)], listed, n, kTemperatures[row], rest, slopes);
    const double slack = (1 + std::fabs(wanted)) * 0x1p-18;
    expect(std::fabs(loss[row] - wanted) <= slack, "baseline", "loss", loss[row], wanted);
    for (int64_t i = 0; i < n; ++i)
      expect(std::fabs(grad[row * n + i] - slopes[i]) <= slack, "baseline", "gradient", grad[row * n + i], slopes[i]);
  }
}

}  // namespace

int main() {
  for (bool rest : {false, true})
    for (int64_t n : {3, 4, 5, 17, 64, 511, 512, 513, 1000, 2049}) check(n, n > 40 ? 20 : 2, rest);
  std::puts("baseline");
  return failures > 0;
}
