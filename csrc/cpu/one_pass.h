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
  int64_t rows, cols;            // output voxels of a tile
  int64_t rows_in, cols_in;      // input voxels it reads, halo included
  int64_t slots;                 // planes in the ring
  int64_t row_tiles, col_tiles;  // tiles that cover the output plane
};

// Weights are float32, packed by `pack` in launch.cpp: blocks of 2·lanes output channels (the last one
// may be of 1·lanes), each [reduction][channels of the block], zero-filled.
struct OnePass {
  Geometry g;
  Tiles tiles;
  const void* x;
  void* y;
  Strides x_strides, y_strides;
  const float *u_in, *core, *u_out;
  const float* bias;  // [out_channels rounded up to 2·lanes], zeros if the layer has none
};

// Computes units [begin, end) of batch · row_tiles · col_tiles · depth, depth running fastest.
using Run = void (*)(const OnePass&, int64_t begin, int64_t end, float* scratch);

struct Kernels {
  const char* name;
  int64_t lanes;  // float32 values in a vector
  Run float32, bfloat16;
};

// static: a copy of these compiled with wider instructions must stay in its object file.
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int64_t ring_floats(const Geometry& g, const Tiles& t, int64_t lanes) {
  return t.slots * t.rows_in * t.cols_in * ceil_div(g.rank_in, lanes) * lanes;
}

static inline int64_t plane_floats(const Geometry& g, const Tiles& t, int64_t lanes) {
  return t.rows * t.cols * ceil_div(g.rank_out, lanes) * lanes;
}

// Scratch a thread needs: the ring, one plane of the second stage's output, and the ring's tags.
static inline int64_t scratch_floats(const Geometry& g, const Tiles& t, int64_t lanes) {
  return ring_floats(g, t, lanes) + plane_floats(g, t, lanes) + 2 * t.slots;
}

#if defined(__x86_64__)
extern const Kernels kernels_avx512, kernels_avx2, kernels_wide;
#endif
extern const Kernels kernels_baseline;

}  // namespace tucker_ops::cpu
