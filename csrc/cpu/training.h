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

// sums[row][column] = Σ over depth of left[k · left_k + row · left_row] · right[k · right_k + column], added to what is there
// if `add`. Columns come in vectors of `lanes` floats, which begin at columns[0 .. vectors) of right and lie side by side
// in sums, whose rows are `pitch` apart.
struct Products {
  const float* left;
  int64_t left_k, left_row, rows;
  const float* right;
  int64_t right_k;
  const int64_t* columns;
  int64_t vectors, depth;
  float* sums;
  int64_t pitch;
  bool add;
};

struct TrainingKernels {
  int64_t lanes;
  NormKernels<float> float32;
  NormKernels<uint16_t> bfloat16;
  void (*products)(const Products& p);
  // sums[c] += Σ over rows of x[row · pitch + c].
  void (*add_rows)(const float* x, int64_t pitch, int64_t channels, int64_t rows, float* sums);
  // bfloat16 to float and back, rounded to nearest, ties to even.
  void (*widen)(const uint16_t* from, int64_t count, float* to);
  void (*narrow)(const float* from, int64_t count, uint16_t* to);
};

extern const TrainingKernels training_baseline;
#if defined(__x86_64__)
extern const TrainingKernels training_avx2;
extern const TrainingKernels training_avx512;
#endif

// Those for this processor, or for what the variable TUCKER_CPU_ISA names if that is less.
const TrainingKernels& training_kernels();

}  // namespace tucker_ops::cpu
