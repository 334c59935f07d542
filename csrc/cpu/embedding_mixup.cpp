// torch.ops.fastkd.embedding_mixup and its backward on the CPU.
#include "cpu/embedding_mixup.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/pairing.h"
#include "cpu/tensor.h"
#include "runtime/huge_pages.h"
#include "simd/dispatch.h"

#define FASTKD_SOURCE "simd/embedding_mixup.h"
#include "simd/foreach_target.h"

namespace fastkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 14;  // elements per task: below that a thread costs more than it brings
constexpr int64_t kFrequent = 64;    // tokens that make a row of the table worth several threads
constexpr int64_t kColumns = 128;    // columns of such a row that one of them takes at a time

Tensor checked_ids(const Tensor& ids_in, int64_t vocabulary) {
  STD_TORCH_CHECK(ids_in.dim() == 2 && ids_in.scalar_type() == ScalarType::Long,
                  "fastkd::embedding_mixup: ids must be (rows, tokens) int64");
  const Tensor ids = torch::stable::contiguous(ids_in);
  const int64_t* values = (const int64_t*)ids.data_ptr();
  for (int64_t i = 0; i < ids.numel(); ++i)
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < vocabulary, "fastkd::embedding_mixup: ids holds ", values[i],
                    ", but table has ", vocabulary, " rows");
  return ids;
}

Tensor embedding_mixup(const Tensor& ids_in, const Tensor& table_in, const Tensor& permutation, const Tensor& lam,
                       int64_t padding_idx) {
  STD_TORCH_CHECK(table_in.dim() == 2, "fastkd::embedding_mixup: table must be (vocabulary, columns)");
  const Tensor ids = checked_ids(ids_in, table_in.size(0)), table = dense_rows(table_in);
  const int64_t rows = ids.size(0), tokens = ids.size(1), columns = table.size(1);
  const Pairing pairing(permutation, lam, rows, false, "embedding_mixup");
  const Tensor out = torch::stable::new_empty(table, {rows, tokens, columns});
  prefer_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  EmbeddingMixupTask task{};
  task.ids = (const int64_t*)ids.data_ptr();
  task.table = table.data_ptr();
  task.out = out.mutable_data_ptr();
  task.tokens = tokens;
  task.columns = columns;
  task.stride = table.stride(0);
  task.order = pairing.order.data();
  task.partner = pairing.partner.data();
  task.weight = pairing.weight.data();
  task.partner_weight = pairing.partner_weight.data();
  task.dtype = dtype_of(table, "embedding_mixup");
  const auto kernel = FASTKD_PICK(embedding_mixup);
  if (out.numel() > 0)
    torch::stable::parallel_for(0, rows * tokens, kGrain / columns + 1,
                                [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
  return out;
}

// The tokens of each row of the table, in the order of the batch: a counting sort.
struct Tokens {
  std::vector<int64_t> first;
  std::vector<Source> sources;

  Tokens(const Tensor& ids, const Pairing& pairing, int64_t vocabulary, int64_t padding_idx) : first(vocabulary + 1) {
    const int64_t n = ids.numel(), tokens = ids.size(1);
    const int64_t* values = (const int64_t*)ids.data_ptr();
    for (int64_t i = 0; i < n; ++i)
      if (values[i] != padding_idx) ++first[values[i] + 1];
    for (int64_t v = 0; v < vocabulary; ++v) first[v + 1] += first[v];
    std::vector<int64_t> next(first);
    sources.resize(first[vocabulary] + 1);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = i / tokens, partner = pairing.partner[row];
      if (values[i] != padding_idx)
        sources[next[values[i]]++] = {i, partner * tokens + i % tokens, pairing.weight[row],
                                      pairing.partner_weight[row]};
    }
  }
};

// Every row of the table's gradient is written once, by whoever owns it: no two threads add to one row, and a sum runs
// in the order of the batch whatever the number of threads.
void run(const EmbeddingGradTask& task, int64_t vocabulary) {
  const auto kernel = FASTKD_PICK(embedding_mixup_backward);
  // Work up to a row of the table, in rows written and read; frequent rows are left to the second loop.
  std::vector<int64_t> work(vocabulary + 1), frequent;
  for (int64_t v = 0; v < vocabulary; ++v) {
    const int64_t count = task.first[v + 1] - task.first[v];
    if (count >= kFrequent) frequent.push_back(v);
    work[v + 1] = work[v] + (count >= kFrequent ? 0 : 1 + 2 * count);
  }
  torch::stable::parallel_for(0, work[vocabulary], kGrain / task.columns + 1, [&](int64_t begin, int64_t end) {
    int64_t v = std::lower_bound(work.begin(), work.end(), begin) - work.begin();
    for (; work[v] < end; ++v)
      if (work[v + 1] > work[v]) kernel(task, v, 0, task.columns);
  });
  const int64_t blocks = (task.columns + kColumns - 1) / kColumns;
  torch::stable::parallel_for(0, (int64_t)frequent.size() * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t c = unit % blocks * kColumns;
      kernel(task, frequent[unit / blocks], c, std::min(c + kColumns, task.columns));
    }
  });
}

Tensor embedding_mixup_backward(const Tensor& grad_in, const Tensor& ids_in, const Tensor& permutation,
                                const Tensor& lam, int64_t vocabulary, int64_t padding_idx) {
  const Tensor ids = checked_ids(ids_in, vocabulary);
  STD_TORCH_CHECK(grad_in.dim() == 3 && grad_in.size(0) == ids.size(0) && grad_in.size(1) == ids.size(1),
                  "fastkd::embedding_mixup_backward: grad must be (rows, tokens, columns)");
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Pairing pairing(permutation, lam, ids.size(0), true, "embedding_mixup_backward");
  const Tokens tokens(ids, pairing, vocabulary, padding_idx);
  const Tensor out = torch::stable::new_empty(grad, {vocabulary, grad.size(2)});
  prefer_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  EmbeddingGradTask task{};
  task.grad = grad.data_ptr();
  task.out = out.mutable_data_ptr();
  task.columns = grad.size(2);
  task.first = tokens.first.data();
  task.sources = tokens.sources.data();
  task.dtype = dtype_of(grad, "embedding_mixup_backward");
  if (out.numel() > 0) run(task, vocabulary);
  return out;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("embedding_mixup", TORCH_BOX(&fastkd::embedding_mixup));
  m.impl("embedding_mixup_backward", TORCH_BOX(&fastkd::embedding_mixup_backward));
}
