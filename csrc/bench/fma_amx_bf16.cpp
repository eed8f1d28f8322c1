// tdpbf16ps: 16 × 32 by 32 × 16 values of bfloat16, added to 16 × 16 sums of float32.
#include "fma.h"

namespace tucker_ops::bench {
namespace {

// Six sums, one matrix on either side.
constexpr int kChains = 6;

struct Layout {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t bytes[16];
  std::uint8_t rows[16];
};

float run(std::int64_t turns) {
  alignas(64) Layout layout = {};
  layout.palette = 1;
  for (int index = 0; index < 8; ++index) {
    layout.rows[index] = 16;
    layout.bytes[index] = 64;
  }
  // Pairs that cancel: 0.5 and -0.5, times ones.
  alignas(64) std::uint32_t ones[256], small[256];
  for (int index = 0; index < 256; ++index) {
    ones[index] = 0x3f803f80u;
    small[index] = 0xbf003f00u;
  }
  const std::int64_t row = 64;
  float sums[256];
  asm volatile(
      "ldtilecfg %0\n\ttileloadd (%1,%3,1), %%tmm6\n\ttileloadd (%2,%3,1), %%tmm7\n\t"
      "tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3\n\ttilezero %%tmm4\n\ttilezero %%tmm5"
      :
      : "m"(layout), "r"(ones), "r"(small), "r"(row)
      : "memory");
  for (std::int64_t turn = 0; turn < turns; ++turn)
    asm volatile(
        "tdpbf16ps %tmm7, %tmm6, %tmm0\n\ttdpbf16ps %tmm7, %tmm6, %tmm1\n\ttdpbf16ps %tmm7, %tmm6, %tmm2\n\t"
        "tdpbf16ps %tmm7, %tmm6, %tmm3\n\ttdpbf16ps %tmm7, %tmm6, %tmm4\n\ttdpbf16ps %tmm7, %tmm6, %tmm5");
  asm volatile("tilestored %%tmm0, (%0,%1,1)\n\ttilerelease" : : "r"(sums), "r"(row) : "memory");
  return sums[0];
}

}  // namespace

const FmaLoop fma_amx_bf16 = {"amx", "bfloat16", 2 * 16 * 16 * 32 * kChains, run};

}  // namespace tucker_ops::bench
