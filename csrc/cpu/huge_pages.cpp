// torch.ops.fastkd.prefer_huge_pages: for large fresh buffers that Python makes.
#include "cpu/huge_pages.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace fastkd {
namespace {

void prefer_huge_pages_(const torch::stable::Tensor& memory) {
  prefer_huge_pages(memory.mutable_data_ptr(), memory.numel() * memory.element_size());
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("prefer_huge_pages_", TORCH_BOX(&fastkd::prefer_huge_pages_)); }
