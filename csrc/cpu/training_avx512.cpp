#define TUCKER_TRAINING training_avx512
#include "training.inl"
