#define TUCKER_TRAINING training_avx2
#include "training.inl"
