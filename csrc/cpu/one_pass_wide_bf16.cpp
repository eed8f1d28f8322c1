// The kernel of AVX512_BF16, lowered as in one_pass_wide.cpp, its pairs multiplied one after the other.
#define TUCKER_LANES 16
#define TUCKER_PAIRS
#define TUCKER_KERNELS kernels_wide_bf16
#define TUCKER_ISA "wide_bf16"
#include "one_pass.inl"
