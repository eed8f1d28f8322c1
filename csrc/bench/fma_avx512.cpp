#define TUCKER_LANES 16
#define TUCKER_CHAINS 24
#define TUCKER_FMA fma_avx512
#define TUCKER_ISA "avx512"
#include "fma.inl"
