// torch.ops.fastkd.lstm_steps on NVIDIA GPUs: which variant of the kernel, in how many groups, and its launch.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <tuple>

#include "cuda/lstm_kernel.h"
#include "cuda/variants.h"

namespace fastkd::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kLargestHidden = 1024, kPortableCluster = 8, kClusterPtx = 90, kSortThreads = 256;

struct Variant {
  void (*kernel)(LstmTask);
  int threads, bytes, rows;  // of a thread block; sequences it takes at a time
  int members;               // thread blocks of a group
  bool cluster;
};

template <template <class> class Exchange, class S>
Variant variant(int hidden) {
  using Way = Exchange<S>;
  if constexpr (exists<S, Way>)
    if (serves<S, Way>(hidden))
      return {all_steps<S, Way>, S::kThreads,           (int)sizeof(Shared<S, Way::kBuffers>),
              S::kRows,          members_of<S>(hidden), std::is_same_v<Way, ClusterExchange<S>>};
  return {};
}

template <template <class> class Exchange>
Variant variant_of(ScalarType dtype, int hidden, int tiles) {
  const auto of_shape = [&](auto shape) { return variant<Exchange, decltype(shape)>(hidden); };
  const auto of_element = [&](auto element) {
    using Element = decltype(element);
    return tiles == 1   ? with_shape<Element, 1>(hidden, of_shape)
           : tiles == 2 ? with_shape<Element, 2>(hidden, of_shape)
                        : with_shape<Element, 4>(hidden, of_shape);
  };
  return dtype == ScalarType::BFloat16 ? of_element(BFloat16{}) : of_element(Half{});
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

cudaLaunchConfig_t configure(const Variant& v, int groups, cudaLaunchAttribute& together, cudaStream_t stream) {
  together.id = v.cluster ? cudaLaunchAttributeClusterDimension : cudaLaunchAttributeCooperative;
  if (v.cluster)
    together.val.clusterDim = {(unsigned)v.members, 1, 1};
  else
    together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(groups * v.members);
  config.blockDim = dim3(v.threads);
  config.dynamicSmemBytes = v.bytes;
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  return config;
}

// Whether there are clusters on the device and in the code it runs, which may come of PTX for older ones.
bool has_clusters(const void* kernel, int device) {
  cudaFuncAttributes code{};
  STD_CUDA_CHECK(cudaFuncGetAttributes(&code, kernel));
  return attribute(cudaDevAttrClusterLaunch, device) != 0 && code.ptxVersion >= kClusterPtx;
}

// Groups that the device can hold at once; 0 where not even one.
int capacity(const Variant& v, int device) {
  const void* kernel = (const void*)v.kernel;
  if (kernel == nullptr || (v.cluster && !has_clusters(kernel, device))) return 0;
  if (v.bytes > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return 0;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.bytes));
  int count = 0;
  if (!v.cluster) {
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, v.threads, v.bytes));
    return count * attribute(cudaDevAttrMultiProcessorCount, device) / v.members;
  }
  if (v.members > kPortableCluster)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchAttribute together{};
  const cudaLaunchConfig_t config = configure(v, 1, together, nullptr);
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) {
    cudaGetLastError();  // this device has no clusters of that size
    return 0;
  }
  return count;
}

int known_capacity(const Variant& v, int device) {
  thread_local std::map<std::tuple<void (*)(LstmTask), int, int>, int> known;
  const auto [found, fresh] = known.try_emplace({v.kernel, v.members, device}, 0);
  if (fresh) found->second = capacity(v, device);
  return found->second;
}

// The tile with the fewest rounds, of several the smallest, and the groups that work side by side. Clusters where the
// device has them.
std::pair<Variant, int> choose(ScalarType dtype, int hidden, int64_t sequences, int64_t directions, int device) {
  for (auto* of : {variant_of<ClusterExchange>, variant_of<GlobalExchange>}) {
    std::pair<Variant, int> best;
    int64_t fewest = INT64_MAX;
    for (int tiles : {1, 2, 4}) {
      const Variant v = of(dtype, hidden, tiles);
      const int room = known_capacity(v, device);
      if (room == 0) continue;
      const int64_t items = (sequences + v.rows - 1) / v.rows * directions, rounds = (items + room - 1) / room;
      if (rounds < fewest) best = {v, (int)(items < room ? items : room)};
      fewest = rounds < fewest ? rounds : fewest;
    }
    if (fewest < INT64_MAX) return best;
  }
  STD_TORCH_CHECK(false, "fastkd::lstm_steps: a hidden size of ", hidden,
                  " takes more multiprocessors or shared memory than this GPU has");
}

void check(const Tensor& gates, const Tensor& lengths, const Tensor& weight) {
  const auto complain = [](bool holds, const char* what) { STD_TORCH_CHECK(holds, "fastkd::lstm_steps: ", what); };
  const auto dtype = weight.scalar_type();
  complain(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "weight must be bfloat16 or float16");
  complain(weight.dim() == 3 && weight.size(1) == kGates * weight.size(2),
           "weight must be (directions, 4 * hidden, hidden)");
  const int64_t directions = weight.size(0), hidden = weight.size(2);
  complain(directions == 1 || directions == 2, "weight must have 1 or 2 directions");
  complain(hidden > 0 && hidden % kUnits == 0 && hidden <= kLargestHidden,
           "hidden must be a multiple of 8 of at most 1024");
  complain(gates.scalar_type() == dtype, "gates must have weight's dtype");
  complain(gates.dim() == 3 && gates.size(1) == directions && gates.size(2) == kGates * hidden,
           "gates must be (tokens, directions, 4 * hidden)");
  complain(gates.size(0) <= INT32_MAX, "gates must have fewer than 2^31 tokens");
  complain(lengths.dim() == 1 && lengths.scalar_type() == ScalarType::Long && lengths.size(0) <= INT32_MAX / 2,
           "lengths must be (sequences,) int64");
  for (const Tensor* tensor : {&gates, &lengths, &weight})
    complain(tensor->is_cuda() && tensor->get_device_index() == gates.get_device_index(),
             "gates, lengths and weight must be on one GPU");
}

// What the kernel reads in octets, copied where it does not lie so.
Tensor in_octets(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  return (uintptr_t)dense.const_data_ptr() % sizeof(Octet) == 0 ? dense : torch::stable::clone(dense);
}

Tensor lstm_steps(const Tensor& gates_in, const Tensor& lengths_in, const Tensor& weight_in) {
  check(gates_in, lengths_in, weight_in);
  const Tensor gates = in_octets(gates_in), lengths = torch::stable::contiguous(lengths_in),
               weight = in_octets(weight_in);
  const int64_t tokens = gates.size(0), sequences = lengths.size(0), directions = weight.size(0);
  const int hidden = (int)weight.size(2), device = gates.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor out = torch::stable::new_empty(weight, {tokens, directions * hidden});
  if (tokens == 0 || sequences == 0) return out;
  const auto [v, groups] = choose(weight.scalar_type(), hidden, sequences, directions, device);

  // Begins, lengths and arrivals: eight bytes a sequence and four a group.
  const Tensor scratch = torch::stable::new_empty(lengths, {sequences + groups});
  auto* sorted = (Sequence*)scratch.mutable_data_ptr();
  const LstmTask task{(const uint16_t*)gates.const_data_ptr(),
                      (const uint16_t*)weight.const_data_ptr(),
                      (uint16_t*)out.mutable_data_ptr(),
                      sorted,
                      (uint32_t*)(sorted + sequences),
                      (int)sequences,
                      (int)directions,
                      hidden,
                      v.members,
                      groups};
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const auto stream = (cudaStream_t)current;
  const int64_t most = sequences > groups ? sequences : groups;
  sort_sequences<<<(unsigned)((most + kSortThreads - 1) / kSortThreads), kSortThreads, 0, stream>>>(
      (const int64_t*)lengths.const_data_ptr(), (int)sequences, tokens, sorted, task.arrivals, groups);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  cudaLaunchAttribute together{};
  const cudaLaunchConfig_t config = configure(v, groups, together, stream);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, v.kernel, task));
  return out;
}

}  // namespace
}  // namespace fastkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) { m.impl("lstm_steps", TORCH_BOX(&fastkd::cuda::lstm_steps)); }
