// Interface between the launcher and the kernels compiled once per instruction set.
//
// A unit of work is one output plane of one tile: `rows` × `cols` output voxels at one depth. A thread
// takes a run of units; walking down in depth it keeps a ring of the last `slots` planes of the first
// stage's output, so each of them is computed once, and neither intermediate exists at full size.
#pragma once

#include <cstdint>

#include "../common/geometry.h"

namespace tucker_ops::cpu {

struct Tiles {
  int64_t winograd;              // m of F(m×m, 3×3) for the second stage, 0 for direct convolution
  int64_t rows, cols;            // output voxels of a tile
  int64_t rows_in, cols_in;      // voxels of the first stage's output that it reads, halo included
  int64_t slots;                 // planes in the ring
  int64_t row_tiles, col_tiles;  // tiles that cover the output plane
};

// One of the tensors that the first stage sums up, or puts side by side. Its extents are those of the input divided by
// `factor`; where that is not 1 there is a matrix for every position within the factor, as in a transposed convolution of
// that stride.
struct Source {
  const void* x = nullptr;
  Strides strides{};
  int64_t channels = 0, factor[3] = {1, 1, 1};
  int64_t width = 0;              // values of a voxel: channels, or ranks where they are to be expanded first
  const float* expand = nullptr;  // packed [channels, width]; null if x holds channels
  const float *scale = nullptr, *shift = nullptr;  // [batch][channels] of a norm still to be applied; null if there is none
  float slope = 1;                // of the LeakyReLU after it; 1 if there is none
  const float* reduce = nullptr;  // packed matrices, `reduce_floats` apart; null: the values are the first stage's output
  int64_t reduce_floats = 0;
  int64_t offset = 0, rows = 0;  // channels of the first stage's output that it makes; the offset is a multiple of kMostLanes
  bool adds = false;             // to what sources before it made of the same channels
};
constexpr int64_t kMostSources = 4;
constexpr int64_t kMostLanes = 16;  // of any vector

// Weights are packed by weights.cpp: blocks of 2·lanes output channels (the last one may be of 1·lanes), each
// [reduction][channels of the block], zero-filled. The reduction runs over units of channels: float32 values, or pairs
// of bfloat16 for kernels that multiply those. The core's runs over taps, then units of input ranks; with Winograd
// there is one such core per point, always in float32, its taps those along depth.
struct OnePass {
  Geometry g;
  Tiles tiles;
  Source sources[kMostSources];
  int64_t source_count;
  const float* in_bias;  // [rank_in rounded up to 2·lanes], added inside the volume; null if there is none
  void* y;
  bool y_is_float;  // whatever the sources are
  Strides y_strides;
  const float *core, *u_out;  // u_out is null where the core's output is the result
  const float* bias;          // [out_channels rounded up to 2·lanes], zeros if the layer has none
  float* stats;               // per unit of work, see stats_floats; or null
  int64_t stats_channels;     // out_channels rounded up to 2·lanes
};

// Computes units [begin, end) of batch · row_tiles · col_tiles · depth, depth running fastest.
using Run = void (*)(const OnePass&, int64_t begin, int64_t end, float* scratch);

// What one instruction set offers; null where another one's kernel has to serve.
struct Kernels {
  const char* name;
  int64_t lanes;  // float32 values in a vector
  Run float32;
  Run bfloat16;  // widened to float32
  Run pairs;     // bfloat16, multiplied in pairs of channels
  bool matrix;   // `pairs` multiplies matrices in the core: see matrix.inl
};

// Vectors of a call: lanes, channels in a unit (see OnePass), and how many times the multiply-adds of a vector of
// float32 the core does at a time.
struct Units {
  int64_t lanes, channels, core = channels;
};

// static: a copy of these compiled with wider instructions must stay in its object file.
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Are its values those that are multiplied?
static inline bool is_ready(const Source& s) { return !s.scale && !s.shift && s.slope == 1.0f && !s.expand; }
static inline bool is_coarse(const Source& s) { return s.factor[0] * s.factor[1] * s.factor[2] > 1; }

// Floats of a unit's statistics: the mean of every channel, then its sum of squared deviations; for a covariance the sums
// of products of the deviations of two channels, [channels][channels], of which those below the diagonal may be missing.
static inline int64_t stats_floats(const Geometry& g, int64_t channels) {
  return channels * (g.covariance ? 1 + channels : 2);
}

// Floats in the packed form of a weight with `channels` outputs and a reduction over `reduction` values.
static inline int64_t packed_floats(int64_t channels, int64_t reduction, int64_t lanes) {
  return ceil_div(channels, lanes) * lanes * reduction;
}

// Input voxels of a row that are read, and output voxels that are written, at a time.
constexpr int64_t kColumns = 48;

// Where a thread's scratch memory holds what, in floats from its start.
struct Scratch {
  int64_t in_plane;               // floats of a plane [row][group][column][lane] of the first stage's output
  int64_t point_in, point_out;    // Winograd: floats between points of a block's input and of its output
  int64_t slot;                   // floats of a plane in the ring
  int64_t plane, products, z, line, sums, ranks, coarse, stats, tags, total;
};

static inline Scratch scratch_of(const Geometry& g, const Tiles& t, const Units& u) {
  const int64_t lanes = u.lanes;
  const int64_t in_ranks = ceil_div(g.rank_in, lanes) * lanes, out_ranks = ceil_div(g.rank_out, lanes) * lanes;
  Scratch s{};
  s.in_plane = t.rows_in * t.cols_in * in_ranks / (t.winograd ? 1 : u.channels);
  int64_t rows = t.rows, cols = t.cols;
  if (t.winograd) {
    const int64_t down = ceil_div(rows, t.winograd), across = ceil_div(cols, t.winograd);
    const int64_t points = (t.winograd + 2) * (t.winograd + 2);
    // An odd number of cache lines, or points would compete for the same sets of the cache.
    s.point_in = (ceil_div(down * across * in_ranks, 16) | 1) * 16;
    s.point_out = (ceil_div(down * across * out_ranks, 16) | 1) * 16;
    s.slot = points * s.point_in;
    s.plane = t.slots * s.slot;
    s.products = s.plane + s.in_plane;
    s.z = s.products + points * s.point_out;
    rows = down * t.winograd;
    cols = across * t.winograd;
  } else {
    s.slot = ceil_div(s.in_plane, lanes) * lanes;
    s.z = t.slots * s.slot;
  }
  s.line = s.z + ceil_div(rows * cols * out_ranks / u.channels, lanes) * lanes;
  const int64_t widest = g.in_channels > g.out_channels ? g.in_channels : g.out_channels;
  s.sums = s.line + ceil_div(widest, lanes) * lanes * (kColumns + 16);
  s.ranks = s.sums + (u.channels == 1 ? 0 : in_ranks * kColumns);
  s.coarse = s.ranks + ceil_div(g.source_ranks, lanes) * lanes * kColumns;
  s.stats = s.coarse + g.coarse_channels * (t.cols_in + 1);
  s.tags = s.stats + stats_floats(g, ceil_div(g.out_channels, 2 * lanes) * 2 * lanes);
  s.total = s.tags + 2 * (t.slots + kMostSources);
  return s;
}

#if defined(__x86_64__)
extern const Kernels kernels_amx_bf16, kernels_avx512_bf16, kernels_avx512, kernels_avx2, kernels_wide, kernels_wide_bf16,
    kernels_wide_amx;
#endif
extern const Kernels kernels_baseline;

}  // namespace tucker_ops::cpu
