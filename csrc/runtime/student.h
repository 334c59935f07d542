// The whole student, from token ids to logits: fastkd/students/bilstm.py without dropout, layer by layer.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "runtime/lstm.h"

namespace fastkd::runtime {

enum class Pooling { max, min, mean, attention };

// The word embeddings after projection and ReLU, which depend on the word alone.
struct Words {
  Memory rows;               // (words, size): float, or bytes with 128 for zero, padded to a multiple of 4
  std::vector<float> scale;  // bytes: per row
  int64_t count = 0, size = 0;
};

// One sentence's way after the attention.
struct Side {
  std::vector<Direction> integrator;
  std::vector<float> scorer;  // of attention pooling, (2 hidden), padded to whole vectors
};

struct Head {
  Panels hidden, output;
  int64_t outputs = 0;
};

struct Student {
  Precision precision = Precision::float32;
  Words words;
  std::vector<Direction> encoder;
  std::vector<Side> sides;  // one that both sentences share, or two
  std::vector<Pooling> pooling;
  std::map<std::string, Head> heads;

  int64_t width() const { return 2 * encoder[0].hidden; }
};

// Of one sentence: each of its rows attends to the other's; see simd/attend.h. Rows are `stride` floats apart, zeros
// from width on.
struct AttendTask {
  const float* states;
  int64_t rows;
  const float* others;
  int64_t other_rows, stride, width;
  void* mixed;  // (rows, 3 width), rows mixed_stride elements apart: bytes where there is a scale, else floats
  int64_t mixed_stride;
  float* scale;  // (rows) or null
  float* memory;
  static int64_t floats(int64_t other_rows, int64_t stride, int64_t width) {
    return 4 * (other_rows + 16) + 4 * stride + 3 * width + 16;
  }
};

// What is asked of a student: tokens of all sentences one after the other, and the sentences' lengths, all at least 1.
// In pairs, sentences 2i and 2i + 1 belong together; otherwise each sentence is read against itself.
struct Question {
  const int32_t* ids;
  std::vector<int64_t> lengths;
  bool pairs;
  int64_t rows() const { return (int64_t)lengths.size() / (pairs ? 2 : 1); }
};

// logits: (rows, head.outputs)
void answer(const Student& student, const Head& head, const Question& question, float* logits, Workers& workers);

}  // namespace fastkd::runtime
