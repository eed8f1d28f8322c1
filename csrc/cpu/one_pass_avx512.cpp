#define TUCKER_LANES 16
#define TUCKER_KERNELS kernels_avx512
#define TUCKER_ISA "avx512"
#include "one_pass.inl"
