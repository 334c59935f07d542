// The recurrent kernel on an emulated GPU against a plain LSTM in double precision; prints what was checked.
#include <cstdio>
#include <numeric>

#include "cuda/lstm_kernel.h"
#include "cuda/variants.h"

using namespace fastkd::cuda;

namespace {

constexpr int kGuard = 64;  // numbers before and behind the output that nobody may touch
constexpr uint16_t kUntouched = 0x7fff;
int failures = 0;

void expect(bool condition, const char* what, double got, double wanted) {
  if (!condition && ++failures <= 20) std::printf("%s: got %.9g, expected %.9g\n", what, got, wanted);
}

struct Problem {
  int hidden, directions;
  std::vector<int64_t> lengths;
  int64_t tokens;
  std::vector<Octet> gates, weight;  // aligned as torch's memory is
};

template <class Element>
std::vector<Octet> numbers(int64_t count, double deviation, std::mt19937& random) {
  std::normal_distribution<float> normal(0, (float)deviation);
  std::vector<Octet> all((count + 7) / 8);
  for (int64_t i = 0; i < count; ++i) ((uint16_t*)all.data())[i] = Element::round(normal(random));
  return all;
}

template <class Element>
Problem problem(int hidden, int directions, std::vector<int64_t> lengths) {
  std::mt19937 random(hidden);
  Problem p{hidden, directions, lengths, std::accumulate(lengths.begin(), lengths.end(), (int64_t)0), {}, {}};
  p.gates = numbers<Element>(p.tokens * directions * 4 * hidden, 1, random);
  p.weight = numbers<Element>((int64_t)directions * 4 * hidden * hidden, 1 / std::sqrt(hidden), random);
  return p;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// The hidden state is rounded to 16 bits from step to step, as the kernel's is.
template <class Element>
std::vector<double> plain_lstm(const Problem& p) {
  const int64_t n = p.hidden;
  const auto value = [](const std::vector<Octet>& from, int64_t i) {
    return (double)Element::widen(((const uint16_t*)from.data())[i]);
  };
  std::vector<double> out(p.tokens * p.directions * n, NAN);
  int64_t begin = 0;
  for (int64_t length : p.lengths) {
    for (int d = 0; d < p.directions; ++d) {
      std::vector<double> h(n), c(n);
      for (int64_t step = 0; step < length; ++step) {
        const int64_t row = (begin + (d == 1 ? length - 1 - step : step)) * p.directions + d;
        std::vector<double> next(n);
        for (int64_t unit = 0; unit < n; ++unit) {
          double gates[4];
          for (int64_t g = 0; g < 4; ++g) {
            gates[g] = value(p.gates, (row * 4 + g) * n + unit);
            for (int64_t k = 0; k < n; ++k) gates[g] += value(p.weight, ((d * 4 + g) * n + unit) * n + k) * h[k];
          }
          c[unit] = sigmoid(gates[1]) * c[unit] + sigmoid(gates[0]) * std::tanh(gates[2]);
          out[row * n + unit] = sigmoid(gates[3]) * std::tanh(c[unit]);
          next[unit] = Element::widen(Element::round((float)out[row * n + unit]));
        }
        h = next;
      }
    }
    begin += length;
  }
  return out;
}

// What the op does with a problem, `members` thread blocks in each of `groups`.
template <class S, class Exchange>
std::vector<uint16_t> run(const Problem& p, int groups, unsigned seed) {
  const int count = (int)p.lengths.size(), members = members_of<S>(p.hidden);
  const int64_t size = p.tokens * p.directions * p.hidden;
  std::vector<Octet> memory((size + 2 * kGuard + 7) / 8);
  auto* all = (uint16_t*)memory.data();
  std::fill(all, all + memory.size() * 8, kUntouched);
  std::vector<Sequence> sorted(count);
  std::vector<uint32_t> arrivals(groups, 77);
  emulator::launch((std::max(count, groups) + 31) / 32, 32, 1, 0, seed,
                   [&] { sort_sequences(p.lengths.data(), count, p.tokens, sorted.data(), arrivals.data(), groups); });
  for (int i = 1; i < count; ++i) expect(sorted[i].length <= sorted[i - 1].length, "order", i, i);

  const auto range = [](const auto& v) {
    return emulator::Range{(const char*)v.data(), (const char*)(v.data() + v.size())};
  };
  emulator::readable = {range(p.gates), range(memory)};
  const LstmTask task{(const uint16_t*)p.gates.data(),
                      (const uint16_t*)p.weight.data(),
                      all + kGuard,
                      sorted.data(),
                      arrivals.data(),
                      count,
                      p.directions,
                      p.hidden,
                      members,
                      groups};
  emulator::launch(groups * members, S::kThreads, members, sizeof(Shared<S, Exchange::kBuffers>), seed,
                   [&] { all_steps<S, Exchange>(task); });
  for (int64_t i = 0; i < (int64_t)memory.size() * 8; ++i)
    if (i < kGuard || i >= kGuard + size) expect(all[i] == kUntouched, "guard", (double)i, all[i]);
  return {all + kGuard, all + kGuard + size};
}

// Whatever the way and the tile, results are the same to the last bit, and near the plain LSTM's.
template <class Element, int... kTiles>
void check(const Problem& p) {
  std::vector<std::vector<uint16_t>> results;
  unsigned seed = p.hidden;
  const auto all_ways = [&](auto shape) {
    using S = decltype(shape);
    for (int groups : {1, 3}) {
      if constexpr (exists<S, ClusterExchange<S>>)
        if (serves<S, ClusterExchange<S>>(p.hidden)) results.push_back(run<S, ClusterExchange<S>>(p, groups, ++seed));
      results.push_back(run<S, GlobalExchange<S>>(p, groups, ++seed));
    }
  };
  (with_shape<Element, kTiles>(p.hidden, all_ways), ...);
  const std::vector<double> wanted = plain_lstm<Element>(p);
  const bool is_half = std::is_same_v<Element, Half>;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double got = Element::widen(results[0][i]), bound = is_half ? 0x1p-10 : 0x1p-7;  // a unit of 16 bits at 1
    expect(std::fabs(got - wanted[i]) <= bound, "hidden state", got, wanted[i]);
    for (const auto& other : results) expect(other[i] == results[0][i], "other way", other[i], results[0][i]);
  }
  std::printf("%s hidden=%d directions=%d sequences=%d ways=%d\n", is_half ? "float16" : "bfloat16", p.hidden,
              p.directions, (int)p.lengths.size(), (int)results.size());
}

void check_update() {
  for (double base = -100; base <= 100; base += 0.37)
    for (int gate = 0; gate < kGates; ++gate)
      for (double other : {-20.0, -3.0, -0.01, 0.0, 0.7, 5.0, 100.0}) {
        float gates[kGates], cell = (float)(base / 30);
        for (int g = 0; g < kGates; ++g) gates[g] = (float)(g == gate ? base : other);
        const double before = cell, c = sigmoid(gates[1]) * before + sigmoid(gates[0]) * std::tanh((double)gates[2]);
        const double got = update(gates, cell);
        expect(std::fabs(got - sigmoid(gates[3]) * std::tanh(c)) < 2e-6, "new state", got,
               sigmoid(gates[3]) * std::tanh(c));
        expect(std::fabs(cell - c) < 2e-6, "cell", cell, c);
      }
}

// Eight lanes are served at once where each has 16 bytes: their octets must lie in eight different places of a row.
void check_banks() {
  using S = Shape<Half, 8, 1, 4>;
  const auto distinct = [](auto place_of) {
    unsigned places = 0;
    for (int lane = 0; lane < 8; ++lane) places |= 1u << place_of(lane) % 8;
    expect(places == 255, "banks", places, 255);
  };
  for (int row = 0; row < S::kRows; row += 2)
    for (int octet : {0, 4}) distinct([&](int lane) { return octet_at<S>(row + lane / 4, 0, octet + lane % 4); });
  for (int octet = 0; octet < 8; ++octet) distinct([&](int lane) { return octet_at<S>(8 + lane, 1, octet); });
}

// Lengths that a caller should not give: nothing outside the tensors is read (copies see to that) or written.
void check_wrong_lengths() {
  using S = Shape<Half, 4, 1, 1>;
  Problem p = problem<Half>(40, 2, {3, 4});
  for (std::vector<int64_t> lengths : {std::vector<int64_t>{-5, 3, 9}, {INT64_MAX, INT64_MAX, 2}, {INT64_MIN, 1}}) {
    p.lengths = lengths;
    run<S, ClusterExchange<S>>(p, 2, 1);
  }
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IONBF, 0);
  check_update();
  check_banks();
  check_wrong_lengths();
  const std::vector<int64_t> mixed{3, 0, 7, 1, 5, 2, 2, 6, 1, 4, 3};
  check<Half, 1, 2, 4>(problem<Half>(8, 1, {2, 1}));
  check<Half, 1, 2, 4>(problem<Half>(40, 2, mixed));
  check<BFloat16, 1, 2, 4>(problem<BFloat16>(128, 1, mixed));
  check<BFloat16, 1, 2, 4>(problem<BFloat16>(136, 2, {2, 5, 0, 1, 3}));
  check<Half, 1, 2, 4>(problem<Half>(256, 1, {3, 1, 4}));
  check<Half, 1, 2, 4>(problem<Half>(264, 1, {3, 1}));
  check<BFloat16, 1, 4>(problem<BFloat16>(520, 1, {2, 1}));
  return failures > 0;
}
