#define TUCKER_TRAINING training_baseline
#include "training.inl"
