#define TUCKER_LANES 8
#define TUCKER_KERNELS kernels_avx2
#define TUCKER_ISA "avx2"
#include "one_pass.inl"
