// Hands each task to the kernel of the best instruction set.
#include "cpu/squared_error.h"

#include "simd/dispatch.h"

#define FASTKD_SOURCE "simd/squared_error.h"
#include "simd/foreach_target.h"

namespace fastkd {

void squared_error(const SquaredErrorTask& task, int64_t begin, int64_t end) {
  FASTKD_PICK(squared_error)(task, begin, end);
}
void gather_rows(const MoveRowsTask& task) { FASTKD_PICK(move_rows)(task, false); }
void scatter_rows(const MoveRowsTask& task) { FASTKD_PICK(move_rows)(task, true); }
void sum_terms(const SumTask& task, int64_t begin, int64_t end) { FASTKD_PICK(sum_terms)(task, begin, end); }
void add_bfloat16(float* sums, const void* terms, int64_t count) { FASTKD_PICK(add_bfloat16)(sums, terms, count); }

}  // namespace fastkd
