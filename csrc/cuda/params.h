// What launches give to kernels: pointers into device memory and extents. Plain data, no CUDA and no torch here.
//
// Activations are channels-last and dense; extents run depth, height, width, with depth 1 in 2D.
#pragma once

#include <cstdint>

namespace tucker_ops::cuda {

constexpr int kMostSources = 4;

// One input of a first stage or of a dense convolution, with the norm still to be applied to it.
struct Source {
  const void* x;         // [batch, extent…, spacing]
  const void* weight;    // rows [rows, pitch] for every tap and class
  const float* scale;    // [batch, channels], or null
  const float* shift;    // the same
  float slope;           // of LeakyReLU, 1 for none
  int channels;
  int spacing;           // elements between voxels
  int pitch;             // elements between rows of the weight
  int extent[3];
  bool coarse;           // extents are those of the volume divided by the classes' factors
  bool vectors;          // voxels and rows of the weight begin at multiples of 16 bytes
  // Few channels: rows of the weight are [channel][tap], summed up as if taps were channels.
  bool taps_within;
  int64_t tap_stride;    // elements of the weight from one tap, or one class, to the next
};

// Writes u_out · z: the third stage.
struct Expansion {
  const void* u_out;     // [channels, pitch], zero beyond the rank
  const void* bias;      // [channels], or null
  int pitch;
  int channels;
};

// Per block, item and channel of the output: how many values, their mean and the sum of squared deviations.
struct Moments {
  float count, mean, m2;
};

// The one-pass kernel: first stage, core and third stage; kernel 3×3 in the plane, no dilation.
struct StreamParams {
  Source source[kMostSources];
  int sources;
  int factor[3];          // classes of voxels, told apart by coarse sources; 1 or 2 along each axis
  const void* in_bias;    // [rank_in], or null
  const void* core;       // [rank_out, rank_in, depth, 3, 3]
  int rank_in, rank_out;
  Expansion expansion;
  void* y;                // [batch, out…, channels]
  Moments* moments;       // [batch, blocks of an item, channels], or null
  int in[3], out[3], padding[3];
  int chunk;              // output planes of a block
  int tiles[3];           // blocks along each axis
};

// A convolution as a matrix product whose left factor is gathered: any kernel, stride, dilation, channels.
struct GatherParams {
  Source source[kMostSources];
  int sources;
  int factor[3];
  int kernel[3], stride[3], padding[3], dilation[3];
  int out[3];             // extents of the output, of all classes together
  int columns;            // of the product
  const void* bias;       // [columns], or null; left out where there is an expansion
  Expansion expansion;    // where the kernel has a third stage
  // Norm and activation of the columns before they are rounded, [batch, columns]; null and 1 for none.
  const float *scale, *shift;
  float slope;
  void* y;
  bool y_is_float;
  bool y_vectors;         // 16-byte stores are aligned
  bool y_channel;         // channel after channel, [batch, y_columns, out…]
  int y_pitch, y_column;  // elements between voxels, and the first of ours
  int y_columns;          // columns to write: beyond the product's own, zeros
  Moments* moments;       // as above, a block of an item being one along the grid's x
};

struct MergeMomentsParams {
  const Moments* moments;  // [batch, blocks, channels]
  int blocks, channels;
  int splits;              // parts that the blocks are merged in, each to one
  Moments* merged;         // [batch, splits, channels], or null
  float *mean, *m2;        // [batch, channels], where splits are 1
};

// mean [batch, channels] and sums of products of deviations [batch, channels, channels] of z [batch, voxels, channels].
struct CovarianceParams {
  const void* z;
  float* products;  // [batch, chunks, channels, channels] of deviations from an item's first voxel
  float* sums;      // [batch, chunks, channels] of those deviations
  float *mean, *m2;
  int64_t voxels;
  int channels, chunks;
};

// Weights for the gather kernel: to[tap][row][k], rows and k padded with zeros, from any strides.
struct PackJob {
  const void* from;   // null: the identity
  void* to;
  int rows, columns, padded_rows, pitch;
  int64_t taps, tap_stride, row_stride, column_stride;
};

constexpr int kMostJobs = 2 * kMostSources + 2;

struct PackParams {
  PackJob job[kMostJobs];
  int blocks;  // of each job
};

// scale = weight / sqrt(m2 / count + eps), shift = bias - mean · scale, all [batch, channels] but weight and bias [channels].
struct NormParams {
  const float *mean, *m2;
  const void *weight, *bias;  // or null; float32, float16 or bfloat16
  int weight_bytes, bias_bytes;
  bool weight_is_bf16, bias_is_bf16;
  float *scale, *shift;
  float count, eps;
  int channels, total;
};

// LeakyReLU of a sum of values, each with its own norm and LeakyReLU.
struct MergeParams {
  const void* value[kMostSources];
  const float* scale[kMostSources];
  const float* shift[kMostSources];
  float slope[kMostSources];
  int values;
  float out_slope;
  void* y;
  int64_t voxels;     // of an item
  int channels, batch, blocks;
  bool vectors;       // values are aligned to 16 bytes, and channels fill them
};

}  // namespace tucker_ops::cuda
