// Runs the checks of vec.h on every target of this CPU; says which on stdout, and what failed.
#include "check.h"
#include "simd/dispatch.h"

#if defined(__x86_64__)
#define FASTKD_NAME (kLanes == 16 ? "avx512" : kLanes == 8 ? "avx2" : "baseline")
#else
#define FASTKD_NAME "baseline"
#endif
#define FASTKD_SOURCE "vec_checks.h"
#include "simd/foreach_target.h"

int main() {
  std::puts("baseline");
  fastkd::baseline::check();
#if defined(__x86_64__)
  if (fastkd::best_target() >= fastkd::Target::avx2) {
    std::puts("avx2");
    fastkd::avx2::check();
  }
  if (fastkd::best_target() >= fastkd::Target::avx512) {
    std::puts("avx512");
    fastkd::avx512::check();
  }
#endif
  return failures > 0;
}
