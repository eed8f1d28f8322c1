#define TUCKER_LANES 4
#define TUCKER_CHAINS 14
#define TUCKER_FMA fma_baseline
#define TUCKER_ISA "baseline"
#include "fma.inl"
