#include "training.h"

#include <cstdlib>
#include <cstring>

namespace tucker_ops::cpu {

const TrainingKernels& training_kernels() {
#if defined(__x86_64__)
  const char* const isa = std::getenv("TUCKER_CPU_ISA");
  const auto named = [isa](const char* prefix) { return !isa || !*isa || !std::strncmp(isa, prefix, std::strlen(prefix)); };
  __builtin_cpu_init();
  if ((named("avx512") || named("amx")) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return training_avx512;
  // The sets named wide are made of baseline instructions, as the one of that name is.
  if ((named("avx") || named("amx")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return training_avx2;
#endif
  return training_baseline;
}

}  // namespace tucker_ops::cpu
