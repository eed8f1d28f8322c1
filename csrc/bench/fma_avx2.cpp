#define TUCKER_LANES 8
#define TUCKER_CHAINS 12
#define TUCKER_FMA fma_avx2
#define TUCKER_ISA "avx2"
#include "fma.inl"
