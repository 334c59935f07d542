// What a thread block of each variant of the recurrent kernel takes, a line each.
#include <cstdio>

#include "cuda/variants.h"

using namespace fastkd::cuda;

namespace {

template <class S, class Exchange>
void print(int hidden, const char* exchange) {
  if constexpr (exists<S, Exchange>)
    std::printf("%d %d %d %d %s %d %d %zu\n", hidden, S::kChunks, S::kParts, S::kTiles, exchange, members_of<S>(hidden),
                S::kThreads, sizeof(Shared<S, Exchange::kBuffers>));
}

template <int... kTiles>
void print_all(int hidden) {
  const auto both = [&](auto shape) {
    using S = decltype(shape);
    print<S, ClusterExchange<S>>(hidden, "cluster");
    print<S, GlobalExchange<S>>(hidden, "global");
  };
  (with_shape<Half, kTiles>(hidden, both), ...);
}

}  // namespace

int main() {
  for (int hidden : {128, 256, 512, 1024}) print_all<1, 2, 4>(hidden);
}
