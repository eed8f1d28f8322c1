// Shapes of one call, shared by every backend. No torch header here.
#pragma once

#include <cstdint>

namespace tucker_ops {

// Spatial arrays run depth, height, width; a 2D problem has depth 1. in_channels counts those of all sources. Without a
// first (or third) stage its channels are the core's ranks.
struct Geometry {
  int64_t batch, in_channels, rank_in, rank_out, out_channels;
  // Is there a second, a third stage? A convolution of one tap alone is a third stage.
  bool convolved = true, expanded = true;
  bool covariance = false;               // of the output's channels, beside their mean
  int64_t reduce_macs = 0;  // multiply-adds per voxel of the first stage
  // Sources in rank space: the most ranks that one has, and multiply-adds per voxel that expand all of them.
  int64_t source_ranks = 0, source_macs = 0;
  int64_t coarse_channels = 0;  // of sources with smaller extents, those of each rounded up to the most lanes of any vector
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
};

// Distances between neighbours in elements.
struct Strides {
  int64_t batch, channel, space[3];
};

}  // namespace tucker_ops
