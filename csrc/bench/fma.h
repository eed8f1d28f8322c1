// Arithmetic in registers alone, as fast as the processor can: one loop per instruction set and object file.
#pragma once

#include <cstdint>

namespace tucker_ops::bench {

// run(turns) multiplies and adds `turns` times in every one of its accumulators, and returns their sum.
struct FmaLoop {
  const char* isa;
  const char* dtype;
  int flops_per_turn;
  float (*run)(std::int64_t turns);
};

extern const FmaLoop fma_amx_bf16;
extern const FmaLoop fma_avx512_bf16;
extern const FmaLoop fma_avx512;
extern const FmaLoop fma_avx2;
extern const FmaLoop fma_baseline;

}  // namespace tucker_ops::bench
