// The kernel of AMX, lowered as in one_pass_wide.cpp, its tile registers replaced by arrays.
#define TUCKER_LANES 16
#define TUCKER_PAIRS
#define TUCKER_MATRIX
#define TUCKER_KERNELS kernels_wide_amx
#define TUCKER_ISA "wide_amx"
#include "one_pass.inl"
