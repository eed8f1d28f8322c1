// Kernels that only training needs, compiled once for every set of instructions that makes them faster.
#pragma once

#include <cstdint>

namespace tucker_ops::cpu {

// A stretch of voxels of a channels-last tensor; T is float, or uint16_t for bfloat16.
template <class T>
struct NormKernels {
  // Mean and sum of squared deviations of each channel, in two passes.
  void (*statistics)(const T* x, int64_t channels, int64_t voxels, float* mean, float* m2);
  // y = LeakyReLU(x · scale + shift).
  void (*apply)(const T* x, int64_t channels, int64_t voxels, const float* scale, const float* shift, float slope, T* y);
  // With g' the gradient behind the activation: Σ g' and Σ g' (x - mean).
  void (*sums)(const T* grad, const T* x, int64_t channels, int64_t voxels, const float* scale, const float* shift,
               const float* mean, float slope, float* sum, float* product);
  // scale · g' + along · (x - mean) + constant.
  void (*gradient)(const T* grad, const T* x, int64_t channels, int64_t voxels, const float* scale, const float* shift,
                   const float* mean, const float* along, const float* constant, float slope, T* grad_x);
};

// One row of output voxels and one tap: where the tap's first input voxel lies, and how far apart they are.
struct RowPair {
  const float *grad, *t;
  int64_t voxels, grad_step, t_step;
};

struct TrainingKernels {
  NormKernels<float> float32;
  NormKernels<uint16_t> bfloat16;
  // weights[i][j] += Σ over the row's voxels of grad[i] · t[j]; rank_in a multiple of 8.
  void (*outer)(const RowPair& row, int64_t rank_out, int64_t rank_in, float* weights);
};

extern const TrainingKernels training_baseline;
#if defined(__x86_64__)
extern const TrainingKernels training_avx2;
#endif

// Those for this processor, or for what the variable TUCKER_CPU_ISA names if that is less.
const TrainingKernels& training_kernels();

}  // namespace tucker_ops::cpu
