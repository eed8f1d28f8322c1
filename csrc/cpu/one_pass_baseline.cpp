#define TUCKER_LANES 4
#define TUCKER_KERNELS kernels_baseline
#define TUCKER_ISA "baseline"
#include "one_pass.inl"
