// torch.ops.fastkd.mixup on the CPU: rows in parallel, each by the kernel of the best instruction set.
#include "cpu/mixup.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/pairing.h"
#include "cpu/tensor.h"
#include "runtime/huge_pages.h"
#include "simd/dispatch.h"

#define FASTKD_SOURCE "simd/mixup.h"
#include "simd/foreach_target.h"

namespace fastkd {
namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 14;    // elements per task: below that a thread costs more than it brings
constexpr int64_t kChunk = 512 << 10;  // bytes of a row taken at a time, so that a row and its partner stay in L2

void run(const MixupTask& task) {
  const auto kernel = FASTKD_PICK(mixup);
  const int64_t units = (task.columns + task.chunk - 1) / task.chunk * task.rows;
  torch::stable::parallel_for(0, units, kGrain / task.chunk + 1,
                              [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
}

Tensor mixup(const Tensor& x_in, const Tensor& permutation, const Tensor& lam, bool transpose) {
  STD_TORCH_CHECK(x_in.dim() == 2, "fastkd::mixup: x must be (rows, columns)");
  const int64_t rows = x_in.size(0), columns = x_in.size(1);
  const Pairing pairing(permutation, lam, rows, transpose, "mixup");
  const Tensor x = dense_rows(x_in);
  const Tensor out = torch::stable::new_empty(x, {rows, columns});
  prefer_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  const int64_t chunk = kChunk / x.element_size();
  MixupTask task{};
  task.x = x.data_ptr();
  task.out = out.mutable_data_ptr();
  task.rows = rows;
  task.columns = columns;
  task.stride = x.stride(0);
  task.chunk = columns < chunk ? columns : chunk;
  task.order = pairing.order.data();
  task.partner = pairing.partner.data();
  task.weight = pairing.weight.data();
  task.partner_weight = pairing.partner_weight.data();
  task.dtype = dtype_of(x, "mixup");
  if (rows > 0 && columns > 0) run(task);
  return out;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("mixup", TORCH_BOX(&fastkd::mixup)); }
