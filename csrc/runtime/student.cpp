#include "runtime/student.h"

#include <algorithm>
#include <numeric>

#include "simd/dispatch.h"

#define FASTKD_SOURCE "simd/attend.h"
#include "simd/foreach_target.h"

namespace fastkd::runtime {
namespace {

constexpr int64_t kVector = 16;

int64_t whole(int64_t n) { return (n + kVector - 1) / kVector * kVector; }

// The sentences on the way through the student.
class Reading {
 public:
  Reading(const Student& student, const Question& question, Workers& workers)
      : student(student), question(question), workers(workers), begin(question.lengths.size()) {
    std::exclusive_scan(question.lengths.begin(), question.lengths.end(), begin.begin(), (int64_t)0);
    tokens = begin.empty() ? 0 : begin.back() + question.lengths.back();
  }

  // (tokens, stride): the first BiLSTM's states.
  Scratch encode() const {
    Inputs words;
    words.ids = question.ids;
    if (bytes) {
      words.bytes = student.words.rows.as<uint8_t>();
      words.scale = student.words.scale.data();
      words.stride = (student.words.size + 3) / 4 * 4;
    } else {
      words.values = student.words.rows.as<float>();
      words.stride = student.words.size;
    }
    return run(student.encoder, words, question.lengths);
  }

  // (tokens, mixed_stride) of bytes or floats; scale (tokens) of the bytes.
  Scratch mix(const float* states, std::vector<float>& scale) const {
    Scratch mixed(tokens * mixed_stride * (bytes ? 1 : sizeof(float)));
    scale.resize(bytes ? tokens : 0);
    workers.run((int64_t)begin.size(), [&](int64_t s) {
      const int64_t other = question.pairs ? s ^ 1 : s, others = question.lengths[other];
      const Scratch memory(AttendTask::floats(others, stride, width) * sizeof(float));
      FASTKD_PICK(attend)
      ({states + begin[s] * stride, question.lengths[s], states + begin[other] * stride, others, stride, width,
        mixed.as<char>() + begin[s] * mixed_stride * (bytes ? 1 : sizeof(float)), mixed_stride,
        bytes ? scale.data() + begin[s] : nullptr, memory.as<float>()});
    });
    return mixed;
  }

  // features (rows, 2 sides, size of a side)
  void integrate(const Inputs& mixed, float* features) const {
    const bool shared = student.sides.size() == 1, same = shared && !question.pairs;
    const int64_t size = side_size();
    for (int side = 0; side < (same ? 1 : 2); ++side)
      pool_side(mixed, student.sides[shared ? 0 : side], side, features);
    for (int64_t r = 0; same && r < question.rows(); ++r)
      std::copy_n(features + 2 * r * size, size, features + (2 * r + 1) * size);
  }

  int64_t side_size() const { return (int64_t)student.pooling.size() * width; }
  int64_t row_stride() const { return mixed_stride; }

 private:
  const Student& student;
  const Question& question;
  Workers& workers;
  const bool bytes = student.precision == Precision::int8;
  const int64_t width = student.width(), stride = whole(width);
  const int64_t mixed_stride = bytes ? (3 * width + 3) / 4 * 4 : whole(3 * width) + kVector;
  std::vector<int64_t> begin;
  int64_t tokens = 0;

  Scratch run(const std::vector<Direction>& layer, const Inputs& x, const std::vector<int64_t>& lengths) const {
    const int64_t rows = std::accumulate(lengths.begin(), lengths.end(), (int64_t)0);
    Scratch states(rows * stride * sizeof(float));
    if (stride != width) std::memset(states.as<char>(), 0, rows * stride * sizeof(float));
    run_lstm({&layer[0], &layer[1]}, x, lengths, states.as<float>(), stride, workers);
    return states;
  }

  // The second BiLSTM and the pooling of all sentences that go this way: of pairs, every other one.
  void pool_side(Inputs mixed, const Side& side, int number, float* features) const {
    const int64_t size = side_size(), step = question.pairs ? 2 : 1;
    std::vector<int64_t> lengths, first;
    std::vector<int32_t> rows;
    for (size_t s = question.pairs ? number : 0; s < begin.size(); s += step) {
      lengths.push_back(question.lengths[s]);
      first.push_back((int64_t)rows.size());
      for (int64_t t = 0; t < question.lengths[s]; ++t) rows.push_back((int32_t)(begin[s] + t));
    }
    mixed.ids = rows.data();
    const Scratch states = run(side.integrator, mixed, lengths);
    workers.run((int64_t)lengths.size(), [&](int64_t i) {
      const Scratch memory(lengths[i] * sizeof(float)), pooled((size + kVector) * sizeof(float));
      FASTKD_PICK(pool)
      (states.as<float>() + first[i] * stride, lengths[i], stride, width, student.pooling, side.scorer.data(),
       pooled.as<float>(), memory.as<float>());
      std::copy_n(pooled.as<float>(), size, features + (2 * i + number) * size);
    });
  }
};

// (rows, columns) of W x + b.
Scratch apply(const Panels& w, const float* x, int64_t rows, int64_t stride, bool rectify) {
  Scratch y(rows * w.columns() * sizeof(float));
  const Scratch memory(rows * (4 + w.depth() * 4));
  FASTKD_PICK(linear)(w, x, rows, stride, has_vnni(), rectify, y.as<float>(), memory.as<char>());
  return y;
}

}  // namespace

void answer(const Student& student, const Head& head, const Question& question, float* logits, Workers& workers) {
  const Reading reading(student, question, workers);
  const int64_t rows = question.rows(), size = 2 * reading.side_size();
  if (rows == 0) return;
  const Scratch states = reading.encode(), features(rows * size * sizeof(float));
  std::vector<float> scale;
  const Scratch mixed = reading.mix(states.as<float>(), scale);
  Inputs x;
  x.stride = reading.row_stride();
  x.scale = scale.data();
  if (student.precision == Precision::int8)
    x.bytes = mixed.as<uint8_t>();
  else
    x.values = mixed.as<float>();
  reading.integrate(x, features.as<float>());
  const Scratch hidden = apply(head.hidden, features.as<float>(), rows, size, true);
  const Scratch output = apply(head.output, hidden.as<float>(), rows, head.hidden.columns(), false);
  for (int64_t r = 0; r < rows; ++r)
    std::copy_n(output.as<float>() + r * head.output.columns(), head.outputs, logits + r * head.outputs);
}

}  // namespace fastkd::runtime
