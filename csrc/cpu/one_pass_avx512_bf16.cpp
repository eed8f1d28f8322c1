// As avx512, and bfloat16 is multiplied in pairs of channels by VDPBF16PS, which reads subnormal numbers as zero.
#define TUCKER_LANES 16
#define TUCKER_PAIRS
#define TUCKER_KERNELS kernels_avx512_bf16
#define TUCKER_ISA "avx512_bf16"
#include "one_pass.inl"
