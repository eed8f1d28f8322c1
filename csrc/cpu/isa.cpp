#include "isa.h"

#include <cstring>
#include <string>
#include <vector>

#include "../common/amx.h"

namespace tucker_ops::cpu {
namespace {

std::vector<Kernels> detect() {
  std::vector<Kernels> found;
#if defined(__x86_64__)
  // A set that has only what it does better, the rest filled in from another.
  auto add = [&](Kernels kernels, const Kernels& rest) {
    if (!kernels.float32) kernels.float32 = rest.float32;
    if (!kernels.bfloat16) kernels.bfloat16 = rest.bfloat16;
    found.push_back(kernels);
  };
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
#if defined(TUCKER_AMX_BF16)
    if (__builtin_cpu_supports("avx512bf16") && has_amx_bf16()) add(kernels_amx_bf16, kernels_avx512);
#endif
#if defined(TUCKER_AVX512_BF16)
    if (__builtin_cpu_supports("avx512bf16")) add(kernels_avx512_bf16, kernels_avx512);
#endif
    found.push_back(kernels_avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(kernels_avx2);
#endif
  found.push_back(kernels_baseline);
#if defined(__x86_64__)
  found.push_back(kernels_wide);
  add(kernels_wide_bf16, kernels_wide);
  add(kernels_wide_amx, kernels_wide);
#endif
  return found;
}

const std::vector<Kernels>& available() {
  static const std::vector<Kernels> kernels = detect();
  return kernels;
}

}  // namespace

const Kernels* select_kernels(const char* name) {
  if (!name || !*name) return &available().front();
  for (const Kernels& kernels : available())
    if (!std::strcmp(kernels.name, name)) return &kernels;
  return nullptr;
}

}  // namespace tucker_ops::cpu

const char* tucker_ops_cpu_isas() {
  static const std::string names = [] {
    std::string text;
    for (const auto& kernels : tucker_ops::cpu::available()) {
      if (!text.empty()) text += ',';
      text += kernels.name;
    }
    return text;
  }();
  return names.c_str();
}
