#include "training.h"

#include <cstdlib>
#include <cstring>

namespace tucker_ops::cpu {

const TrainingKernels& training_kernels() {
#if defined(__x86_64__)
  // The sets named wide are made of baseline instructions as well.
  const char* const isa = std::getenv("TUCKER_CPU_ISA");
  const bool baseline = isa && (!std::strcmp(isa, "baseline") || !std::strncmp(isa, "wide", 4));
  __builtin_cpu_init();
  if (!baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return training_avx2;
#endif
  return training_baseline;
}

}  // namespace tucker_ops::cpu
