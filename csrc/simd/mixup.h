// Mixed rows of a batch. Compiled once per target.
#include "simd/mix.h"

namespace {

template <class T>
void mix_rows(const MixupTask& task, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = task.order[unit % task.rows], first = unit / task.rows * task.chunk;
    const int64_t n = first + task.chunk < task.columns ? task.chunk : task.columns - first;
    const T* x = (const T*)task.x + first;
    mix((T*)task.out + row * task.columns + first, x + row * task.stride, x + task.partner[row] * task.stride,
        task.weight[row], task.partner_weight[row], n);
  }
}

}  // namespace

// Units begin..end; unit u is chunk u / rows of the row that comes u % rows in the order.
static void mixup(const MixupTask& task, int64_t begin, int64_t end) {
  switch (task.dtype) {
    case Dtype::float32:
      return mix_rows<float>(task, begin, end);
    case Dtype::bfloat16:
      return mix_rows<BFloat16>(task, begin, end);
    case Dtype::float16:
      return mix_rows<Half>(task, begin, end);
  }
}
