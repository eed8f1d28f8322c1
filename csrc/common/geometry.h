// Shapes of one call, shared by every backend. No torch header here.
#pragma once

#include <cstdint>

namespace tucker_ops {

// Spatial arrays run depth, height, width; a 2D problem has depth 1. in_channels counts those of all sources. Without a
// first (or third) stage its channels are the core's ranks.
struct Geometry {
  int64_t batch, in_channels, rank_in, rank_out, out_channels;
  bool reduced = true, expanded = true;  // is there a first, a third stage?
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
};

// Distances between neighbours in elements.
struct Strides {
  int64_t batch, channel, space[3];
};

}  // namespace tucker_ops
