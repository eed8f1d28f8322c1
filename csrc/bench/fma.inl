// The float32 loop. The including file names it and says how wide a vector is and how many chains of dependent
// operations run side by side: enough to cover latency × units, few enough to stay in registers with two operands.
#include "fma.h"

namespace tucker_ops::bench {
namespace {

typedef float Vector __attribute__((vector_size(4 * TUCKER_LANES)));

float run(std::int64_t turns) {
  Vector chain[TUCKER_CHAINS], factor, term;
  // x ← x · 0.5 + 0.5 stays near 1: neither denormal numbers nor infinities.
  for (int lane = 0; lane < TUCKER_LANES; ++lane) factor[lane] = term[lane] = 0.5f;
  // All different, because a compiler computes equal chains once, and none at 1, which it would see stand still.
  for (int index = 0; index < TUCKER_CHAINS; ++index) chain[index] = term * (index + 0.5f);
  for (std::int64_t turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 32
    for (int index = 0; index < TUCKER_CHAINS; ++index) chain[index] = chain[index] * factor + term;
  }
  float sum = 0;
  for (int index = 0; index < TUCKER_CHAINS; ++index)
    for (int lane = 0; lane < TUCKER_LANES; ++lane) sum += chain[index][lane];
  return sum;
}

}  // namespace

const FmaLoop TUCKER_FMA = {TUCKER_ISA, "float32", 2 * TUCKER_LANES * TUCKER_CHAINS, run};

}  // namespace tucker_ops::bench
