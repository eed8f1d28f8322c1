// As avx512_bf16, and the core of bfloat16 is multiplied by TDPBF16PS in the tile registers of AMX.
#define TUCKER_LANES 16
#define TUCKER_PAIRS
#define TUCKER_MATRIX
#define TUCKER_KERNELS kernels_amx_bf16
#define TUCKER_ISA "amx_bf16"
#include "one_pass.inl"
