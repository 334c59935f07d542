// Which row of a batch is mixed with which, by how much, and in what order the rows are best taken.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace fastkd {

// Row i of M x is weight[i] x[i] + partner_weight[i] x[partner[i]]. The transpose of M has the same form, with the
// inverse permutation.
struct Pairing {
  std::vector<int64_t> partner, order;
  std::vector<float> weight, partner_weight;

  Pairing(const torch::stable::Tensor& permutation_in, const torch::stable::Tensor& lam_in, int64_t rows,
          bool transpose, const char* op)
      : partner(rows, -1), partner_weight(rows) {
    using torch::headeronly::ScalarType;
    STD_TORCH_CHECK(
        permutation_in.dim() == 1 && permutation_in.size(0) == rows && permutation_in.scalar_type() == ScalarType::Long,
        "fastkd::", op, ": permutation must hold one int64 per row");
    STD_TORCH_CHECK(lam_in.dim() == 1 && lam_in.size(0) == rows && lam_in.scalar_type() == ScalarType::Float,
                    "fastkd::", op, ": lam must hold one float32 per row");
    const auto permutation = torch::stable::contiguous(permutation_in), lam = torch::stable::contiguous(lam_in);
    const int64_t* of = (const int64_t*)permutation.data_ptr();
    const float* first = (const float*)lam.data_ptr();
    std::vector<int64_t> inverse(rows, -1);
    for (int64_t i = 0; i < rows; ++i) {
      STD_TORCH_CHECK(of[i] >= 0 && of[i] < rows && inverse[of[i]] < 0, "fastkd::", op,
                      ": permutation must hold every index of the batch once");
      inverse[of[i]] = i;
    }
    weight.assign(first, first + rows);
    for (int64_t i = 0; i < rows; ++i) {
      partner[i] = transpose ? inverse[i] : of[i];
      partner_weight[i] = 1.0f - first[transpose ? inverse[i] : i];
    }
    follow_cycles();
  }

 private:
  // Along its cycles each row is read as a partner and, right after that, by itself, while it is still in the cache.
  void follow_cycles() {
    std::vector<bool> seen(partner.size());
    for (size_t start = 0; start < partner.size(); ++start)
      for (int64_t i = (int64_t)start; !seen[i]; i = partner[i]) {
        seen[i] = true;
        order.push_back(i);
      }
  }
};

}  // namespace fastkd
