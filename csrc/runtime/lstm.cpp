#include "runtime/lstm.h"

#include <algorithm>
#include <numeric>

#include "runtime/tanh.h"
#include "simd/dispatch.h"

#define FASTKD_SOURCE "simd/lstm.h"
#include "simd/foreach_target.h"

namespace fastkd::runtime {
namespace {

constexpr int64_t kEnough = 12;     // sequences side by side that use a reading of the weights well
constexpr int64_t kSequences = 64;  // at most so many side by side: their gates must stay in the cache

// The hidden state lies in (-1, 1) and is held as round(127 h) + 128: the 128 moves into the bias. The gates that pass
// a sigmoid are halved, see update_roughly.
void prepare_int8(Direction& d) {
  constexpr int64_t kCellGate = 2;
  for (int64_t c = 0; c < d.recurrent.columns(); ++c) {
    const float half = c / d.recurrent.group % kGroups == kCellGate ? 1.0f : 0.5f;
    d.recurrent.scale[c] *= half / 127;
    d.input.scale[c] *= half;
    d.input.bias[c] = d.input.bias[c] * half - 128 * d.recurrent.sum[c] * d.recurrent.scale[c];
  }
}

}  // namespace

Direction make_direction(const Matrix& input, const Matrix& recurrent, const float* bias, Precision precision,
                         bool backward) {
  // Only the recurrent weights are read anew in every step; half of the others' bits would cost more than it brings.
  const Precision of_input = precision == Precision::int8 ? precision : Precision::float32;
  Direction d{pack_gates(input, bias, of_input), pack_gates(recurrent, nullptr, precision), recurrent.inputs, backward};
  if (precision == Precision::int8) prepare_int8(d);
  return d;
}

void each_group(int64_t ways, const std::vector<int64_t>& lengths, Threads& threads,
                const std::function<void(int64_t, const Sequences&)>& f) {
  const int64_t count = (int64_t)lengths.size();
  std::vector<int64_t> offsets(count), order(count), begin(count), length(count);
  std::exclusive_scan(lengths.begin(), lengths.end(), offsets.begin(), (int64_t)0);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  for (int64_t i = 0; i < count; ++i) begin[i] = offsets[order[i]], length[i] = lengths[order[i]];

  // Groups that keep all threads busy; more than one each where the batch has them, as threads are not equally fast.
  const int64_t spread = std::max<int64_t>(1, threads.threads() / ways);
  const int64_t several = threads.threads() > 1 ? std::min(count / kEnough, 2 * spread) : 0;
  const int64_t groups = std::max({(count + kSequences - 1) / kSequences, std::min(count, spread), several});
  threads.run(ways * groups, [&](int64_t task) {
    const int64_t way = task % ways, group = task / ways;
    const int64_t first = count * group / groups, last = count * (group + 1) / groups;
    f(way, {&begin[first], &length[first], last - first});
  });
}

void run_lstm(const std::vector<const Direction*>& directions, const Inputs& x, const std::vector<int64_t>& lengths,
              float* y, int64_t y_stride, Threads& threads) {
  each_group((int64_t)directions.size(), lengths, threads, [&](int64_t way, const Sequences& sequences) {
    int64_t column = 0;
    for (int64_t before = 0; before < way; ++before) column += directions[before]->hidden;
    const LstmTask work{directions[way], x, sequences.begin, sequences.length, sequences.count, y + column, y_stride};
    const auto kernel = FASTKD_PICK(lstm);
    const Scratch memory(kernel(work, has_vnni(), nullptr));
    kernel(work, has_vnni(), memory.as<char>());
  });
}

}  // namespace fastkd::runtime
