// The 16-lane kernel of AVX-512, lowered by the compiler to the instructions every x86-64 has: slow, but
// it lets a machine without AVX-512 test that kernel's indexing.
#define TUCKER_LANES 16
#define TUCKER_KERNELS kernels_wide
#define TUCKER_ISA "wide"
#include "one_pass.inl"
