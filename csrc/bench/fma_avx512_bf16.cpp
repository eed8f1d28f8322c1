// vdpbf16ps: a product of two pairs of bfloat16, added to a float32, in every lane.
#include <immintrin.h>

#include "fma.h"

namespace tucker_ops::bench {
namespace {

constexpr int kChains = 24;

float run(std::int64_t turns) {
  const __m512bh ones = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f));
  const __m512bh small = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(-0.5f));
  __m512 chain[kChains];
  for (int index = 0; index < kChains; ++index) chain[index] = _mm512_set1_ps(static_cast<float>(index));
  for (std::int64_t turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 32
    for (int index = 0; index < kChains; ++index) chain[index] = _mm512_dpbf16_ps(chain[index], ones, small);
  }
  float sum = 0;
  for (int index = 0; index < kChains; ++index) sum += chain[index][0];
  return sum;
}

}  // namespace

const FmaLoop fma_avx512_bf16 = {"avx512", "bfloat16", 2 * 32 * kChains, run};

}  // namespace tucker_ops::bench
