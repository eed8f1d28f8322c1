// The one-pass kernel, in vectors of TUCKER_LANES float32. Included by one file per instruction set.
//
// Vectors run over channels. An intermediate is stored in groups of LANES channels, [group][voxel][LANES],
// so that the LANES·MR values a block broadcasts lie at constant offsets from one pointer.

#include <cstdint>

#include "one_pass.h"

#if !defined(TUCKER_LANES) || !defined(TUCKER_KERNELS) || !defined(TUCKER_ISA)
#error "define TUCKER_LANES, TUCKER_KERNELS and TUCKER_ISA before including one_pass.inl"
#endif

#include "vectors.inl"
#include "winograd.inl"

namespace tucker_ops::cpu {
namespace {

template <class T>
struct Worker {
  const OnePass& p;
  const Geometry& g;
  const Tiles& tiles;
  const Scratch at;
  float* const scratch;
  int64_t* const tags;  // input depth that each slot of the ring holds, or -1

  int64_t n = 0, row0 = 0, col0 = 0, rows = 0, cols = 0;  // the tile at work, in output voxels
  int64_t rows_read = 0, cols_read = 0;                   // extents of its plane of the first stage's output
  int64_t down = 0, across = 0;                           // its Winograd blocks

  int64_t ahead_depth = 0, ahead_plane = 0, ahead_planes = 0;  // see fetch_ahead

  const int64_t in_groups, out_groups;
  const int64_t group_stride, row_stride;  // of a plane of the first stage's output, in floats
  const int64_t z_cols, z_row;             // of the plane of the second stage's output

  Worker(const OnePass& pass, float* memory)
      : p(pass),
        g(pass.g),
        tiles(pass.tiles),
        at(scratch_of(g, tiles, LANES)),
        scratch(memory),
        tags(reinterpret_cast<int64_t*>(scratch + at.tags)),
        in_groups(ceil_div(g.rank_in, LANES)),
        out_groups(ceil_div(g.rank_out, LANES)),
        group_stride(tiles.cols_in * LANES),
        row_stride(in_groups * group_stride),
        z_cols(tiles.winograd ? ceil_div(tiles.cols, tiles.winograd) * tiles.winograd : tiles.cols),
        z_row(out_groups * z_cols * LANES) {}

  void select_tile(int64_t index) {
    col0 = index % tiles.col_tiles * tiles.cols;
    row0 = index / tiles.col_tiles % tiles.row_tiles * tiles.rows;
    n = index / (tiles.col_tiles * tiles.row_tiles);
    rows = g.out[1] - row0 < tiles.rows ? g.out[1] - row0 : tiles.rows;
    cols = g.out[2] - col0 < tiles.cols ? g.out[2] - col0 : tiles.cols;
    rows_read = reach(1, rows);
    cols_read = reach(2, cols);
    if (tiles.winograd) {
      down = ceil_div(rows, tiles.winograd);
      across = ceil_div(cols, tiles.winograd);
      rows_read = down * tiles.winograd + 2;
      cols_read = across * tiles.winograd + 2;
    }
    for (int64_t s = 0; s < tiles.slots; ++s) tags[s] = -1;
  }

  // `last`: no unit of this tile follows in this thread.
  void compute(int64_t depth, bool last) {
    ahead_depth = depth;
    ahead_plane = depth_of(depth, g.kernel[0] - 1) + 1;
    ahead_planes = last ? 0 : clamp(depth_of(depth + 1, g.kernel[0] - 1) + 1, 0, g.in[0]) - clamp(ahead_plane, 0, g.in[0]);
    ahead_plane = clamp(ahead_plane, 0, g.in[0]);
    for (int64_t k = 0; k < g.kernel[0]; ++k) {
      const int64_t d = depth_of(depth, k);
      if (d < 0 || d >= g.in[0]) continue;
      const int64_t slot = d % tiles.slots;
      if (tags[slot] == d) continue;
      tags[slot] = d;
      float* ring = scratch + slot * at.slot;
      if (!tiles.winograd) {
        reduce_plane(d, ring);
        continue;
      }
      reduce_plane(d, scratch + at.plane);
      if (tiles.winograd == 4) {
        transform_plane<4>(ring);
      } else {
        transform_plane<2>(ring);
      }
    }
    switch (tiles.winograd) {
      case 4: convolve_blocks<4>(depth); break;
      case 2: convolve_blocks<2>(depth); break;
      default: convolve_plane(depth);
    }
    expand_plane(depth);
  }

  // First stage: one input plane, u_in · x, zero outside the volume and where no output needs it.
  void reduce_plane(int64_t d, float* out) {
    const int64_t rows_needed = reach(1, rows), cols_needed = reach(2, cols);
    const int64_t h0 = row0 * g.stride[1] - g.padding[1], w0 = col0 * g.stride[2] - g.padding[2];
    const int64_t begin = clamp(-w0, 0, cols_needed), end = clamp(g.in[2] - w0, begin, cols_needed);
    for (int64_t row = 0; row < rows_read; ++row, out += row_stride) {
      if (!row_is_read(row)) continue;
      const int64_t h = h0 + row;
      const bool inside = row < rows_needed && h >= 0 && h < g.in[1];
      zero_columns(out, 0, inside ? begin : cols_read);
      if (!inside) continue;
      zero_columns(out, end, cols_read);
      reduce_row(static_cast<const T*>(p.x) + n * p.x_strides.batch + d * p.x_strides.space[0] +
                     h * p.x_strides.space[1] + w0 * p.x_strides.space[2],
                 out, begin, end);
    }
  }

  void reduce_row(const T* x, float* out, int64_t begin, int64_t end) {
    const int64_t space = p.x_strides.space[2];
    for (int64_t col = begin; col < end; col += kColumns) {
      const int64_t count = end - col < kColumns ? end - col : kColumns;
      int64_t lda, step;
      const float* a = read_columns(x + col * space, count, lda, step);
      if (lda == 1) {
        reduce_columns<1>(a, lda, step, count, out + col * LANES);
      } else {
        reduce_columns<0>(a, lda, step, count, out + col * LANES);
      }
    }
  }

  // Voxels as float32: in place if channels lie together, else copied, since a copy reads each cache line
  // once and all channels of a plane may compete for the same few sets of the cache.
  const float* read_columns(const T* x, int64_t count, int64_t& lda, int64_t& step) {
    const int64_t space = p.x_strides.space[2], channel = p.x_strides.channel;
    float* line = scratch + at.line;
    if (channel == 1) {
      lda = space;
      step = 1;
      if constexpr (sizeof(T) == sizeof(float)) return reinterpret_cast<const float*>(x);
      lda = g.in_channels;
      for (int64_t j = 0; j < count; ++j) widen(x + j * space, g.in_channels, line + j * lda);
      return line;
    }
    lda = 1;
    step = kColumns + 16;
    for (int64_t c = 0; c < g.in_channels; ++c, x += channel) {
      if (space == 1) {
        widen(x, count, line + c * step);
      } else {
        for (int64_t j = 0; j < count; ++j) line[c * step + j] = to_float(x[j * space]);
      }
    }
    return line;
  }

  template <int LDA>
  void reduce_columns(const float* a, int64_t lda, int64_t step, int64_t count, float* out) {
    channel_blocks(g.rank_in, [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      const float* w = p.u_in + c * g.in_channels;
      float* group = out + c / LANES * group_stride;
      voxel_blocks<NV>(0, count, [&](auto mr, int64_t col) {
        constexpr int MR = decltype(mr)::value;
        Vec acc[MR][NV] = {};
        accumulate<MR, NV, LDA>(acc, a + col * lda, lda, step, g.in_channels, w);
        for (int v = 0; v < NV; ++v)
          for (int j = 0; j < MR; ++j)
            *reinterpret_cast<Vec*>(group + v * group_stride + (col + j) * LANES) = acc[j][v];
      });
    });
  }

  // Second stage, directly: one output plane of the tile, core ∗ t.
  void convolve_plane(int64_t depth) {
    switch (g.stride[2]) {
      case 1: return convolve_rows<LANES>(depth);
      case 2: return convolve_rows<2 * LANES>(depth);
      default: return convolve_rows<0>(depth);
    }
  }

  template <int LDA>
  void convolve_rows(int64_t depth) {
    const int64_t lda = g.stride[2] * LANES;
    const int64_t plane_taps = g.kernel[1] * g.kernel[2];
    channel_blocks(g.rank_out, [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      const float* w0 = p.core + c * g.kernel[0] * plane_taps * g.rank_in;
      for (int64_t row = 0; row < rows; ++row) {
        if (c == 0) fetch_ahead(row, rows);
        float* out = scratch + at.z + row * z_row + c * z_cols;
        voxel_blocks<NV>(0, cols, [&](auto mr, int64_t col) {
          constexpr int MR = decltype(mr)::value;
          Vec acc[MR][NV] = {};
          const float* w = w0;
          for (int64_t k = 0; k < g.kernel[0]; ++k, w += plane_taps * g.rank_in * NV * LANES) {
            const int64_t d = depth_of(depth, k);
            if (d < 0 || d >= g.in[0]) continue;
            const float* t = scratch + d % tiles.slots * at.slot + row * g.stride[1] * row_stride +
                             col * g.stride[2] * LANES;
            convolve_taps<MR, NV, LDA>(acc, t, lda, w);
          }
          for (int v = 0; v < NV; ++v)
            for (int j = 0; j < MR; ++j)
              *reinterpret_cast<Vec*>(out + (v * z_cols + col + j) * LANES) = acc[j][v];
        });
      }
    });
  }

  template <int MR, int NV, int LDA>
  TUCKER_INLINE void convolve_taps(Vec (&acc)[MR][NV], const float* t, int64_t lda, const float* w) const {
    for (int64_t kh = 0; kh < g.kernel[1]; ++kh) {
      for (int64_t kw = 0; kw < g.kernel[2]; ++kw) {
        const float* a = t + kh * g.dilation[1] * row_stride + kw * g.dilation[2] * LANES;
        w = accumulate_groups<MR, NV, LDA>(acc, a, lda, group_stride, g.rank_in, w);
      }
    }
  }

  // Second stage by Winograd: the first stage's plane to points in the ring, …
  template <int M>
  void transform_plane(float* ring) {
    const float* plane = scratch + at.plane;
    for (int64_t i = 0; i < down; ++i)
      for (int64_t group = 0; group < in_groups; ++group)
        for (int64_t j = 0; j < across; ++j)
          transform_input<M>(plane + i * M * row_stride + group * group_stride + j * M * LANES, row_stride,
                             ring + ((group * down + i) * across + j) * LANES, at.point_in);
  }

  // … and per point a product over taps along depth and input ranks, then back to voxels.
  template <int M>
  void convolve_blocks(int64_t depth) {
    constexpr int points = Winograd<M>::points * Winograd<M>::points;
    const int64_t blocks = down * across, reduction = g.kernel[0] * g.rank_in;
    float* const products = scratch + at.products;
    for (int point = 0; point < points; ++point) {
      fetch_ahead(point, points);
      const float* core = p.core + point * packed_floats(g.rank_out, reduction, LANES);
      channel_blocks(g.rank_out, [&](auto nv, int64_t c) {
        constexpr int NV = decltype(nv)::value;
        float* out = products + point * at.point_out + c * blocks;
        voxel_blocks<NV>(0, blocks, [&](auto mr, int64_t block) {
          constexpr int MR = decltype(mr)::value;
          Vec acc[MR][NV] = {};
          const float* w = core + c * reduction;
          for (int64_t k = 0; k < g.kernel[0]; ++k, w += g.rank_in * NV * LANES) {
            const int64_t d = depth_of(depth, k);
            if (d < 0 || d >= g.in[0]) continue;
            const float* v = scratch + d % tiles.slots * at.slot + point * at.point_in + block * LANES;
            accumulate_groups<MR, NV, LANES>(acc, v, LANES, blocks * LANES, g.rank_in, w);
          }
          for (int v = 0; v < NV; ++v)
            for (int j = 0; j < MR; ++j) *reinterpret_cast<Vec*>(out + (v * blocks + block + j) * LANES) = acc[j][v];
        });
      });
    }
    for (int64_t i = 0; i < down; ++i)
      for (int64_t group = 0; group < out_groups; ++group)
        for (int64_t j = 0; j < across; ++j)
          transform_output<M>(products + ((group * down + i) * across + j) * LANES, at.point_out,
                              scratch + at.z + i * M * z_row + (group * z_cols + j * M) * LANES, z_row);
  }

  // Third stage: u_out · z + bias, to memory.
  void expand_plane(int64_t depth) {
    const Strides& s = p.y_strides;
    T* y = static_cast<T*>(p.y) + n * s.batch + depth * s.space[0] + row0 * s.space[1] + col0 * s.space[2];
    float* const line = scratch + at.line;
    for (int64_t row = 0; row < rows; ++row, y += s.space[1]) {
      for (int64_t col = 0; col < cols; col += kColumns) {
        const int64_t count = cols - col < kColumns ? cols - col : kColumns;
        const float* z = scratch + at.z + row * z_row + col * LANES;
        if (s.channel == 1) {
          expand_columns(z, count, y + col * s.space[2], s.space[2], 1);
        } else {
          expand_columns(z, count, line, LANES, kColumns);
          write_columns(line, count, y + col * s.space[2]);
        }
      }
    }
  }

  // Column j of channel c, a multiple of LANES, goes to out + j · column + c · channel.
  template <class Out>
  TUCKER_INLINE void expand_columns(const float* z, int64_t count, Out* out, int64_t column, int64_t channel) {
    const int64_t out_channels = g.out_channels, rank = g.rank_out, group = z_cols * LANES;
    channel_blocks(out_channels, [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      const float* const w = p.u_out + c * rank;
      const Vec* const bias = reinterpret_cast<const Vec*>(p.bias + c);
      // Scratch is padded to full vectors, the user's memory is not.
      const bool whole = channel != 1 || out_channels - c >= NV * LANES;
      Out* const block = out + c * channel;
      voxel_blocks<NV>(0, count, [&](auto mr, int64_t col) {
        constexpr int MR = decltype(mr)::value;
        Vec acc[MR][NV];
        for (int j = 0; j < MR; ++j)
          for (int v = 0; v < NV; ++v) acc[j][v] = bias[v];
        accumulate_groups<MR, NV, LANES>(acc, z + col * LANES, LANES, group, rank, w);
        Out* to = block + col * column;
        if (whole) {
          for (int j = 0; j < MR; ++j, to += column)
            for (int v = 0; v < NV; ++v) store(to + v * LANES * channel, acc[j][v]);
        } else {
          for (int j = 0; j < MR; ++j, to += column)
            for (int v = 0; v < NV; ++v) {
              const int64_t left = out_channels - c - v * LANES;
              store_lanes(to + v * LANES, acc[j][v], left < LANES ? left : LANES, 1);
            }
        }
      });
    });
  }

  // [group][kColumns][LANES] to channels that lie apart.
  void write_columns(const float* line, int64_t count, T* y) {
    const int64_t space = p.y_strides.space[2], channel = p.y_strides.channel;
    for (int64_t c = 0; c < g.out_channels; c += LANES, line += kColumns * LANES) {
      const int64_t channels = g.out_channels - c < LANES ? g.out_channels - c : LANES;
      int64_t col = 0;
      if (space == 1) {
        for (; col + LANES <= count; col += LANES) {
          Vec values[LANES];
          for (int j = 0; j < LANES; ++j) values[j] = *reinterpret_cast<const Vec*>(line + (col + j) * LANES);
          transpose(values);
          for (int i = 0; i < LANES; ++i)
            if (i < channels) store(y + (c + i) * channel + col, values[i]);
        }
      }
      for (; col < count; ++col)
        store_lanes(y + c * channel + col * space, *reinterpret_cast<const Vec*>(line + col * LANES), channels, channel);
    }
  }

  // Part `step` of `steps` of what the third stage is about to write and the next unit's first stage to read. The
  // second stage leaves the memory idle, and rows of a tile are too short for the processor to foresee.
  void fetch_ahead(int64_t step, int64_t steps) const {
    const int64_t rows_needed = reach(1, rows), items = rows + ahead_planes * rows_needed;
    for (int64_t item = step * items / steps; item < (step + 1) * items / steps; ++item) {
      if (item < rows) {
        const Strides& s = p.y_strides;
        const T* y = static_cast<const T*>(p.y) + n * s.batch + ahead_depth * s.space[0] + (row0 + item) * s.space[1] +
                     col0 * s.space[2];
        fetch_row<1>(y, s, cols, g.out_channels);
        continue;
      }
      const Strides& s = p.x_strides;
      const int64_t d = ahead_plane + (item - rows) / rows_needed;
      const int64_t h = row0 * g.stride[1] - g.padding[1] + (item - rows) % rows_needed;
      const int64_t w0 = col0 * g.stride[2] - g.padding[2];
      const int64_t begin = clamp(w0, 0, g.in[2]), end = clamp(w0 + reach(2, cols), 0, g.in[2]);
      if (h < 0 || h >= g.in[1] || begin >= end) continue;
      const T* x = static_cast<const T*>(p.x) + n * s.batch + d * s.space[0] + h * s.space[1] + begin * s.space[2];
      fetch_row<0>(x, s, end - begin, g.in_channels);
    }
  }

  template <int WRITE>
  static TUCKER_INLINE void fetch_row(const T* row, const Strides& s, int64_t count, int64_t channels) {
    const bool last = s.channel == 1;
    if (!last && s.space[2] != 1) return;
    const int64_t runs = last ? 1 : channels, bytes = (last ? (count - 1) * s.space[2] + channels : count) * sizeof(T);
    for (int64_t run = 0; run < runs; ++run) {
      const char* p = reinterpret_cast<const char*>(row + run * s.channel);
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at, WRITE, 2);
      __builtin_prefetch(p + bytes - 1, WRITE, 2);
    }
  }

  int64_t depth_of(int64_t depth, int64_t tap) const {
    return depth * g.stride[0] - g.padding[0] + tap * g.dilation[0];
  }

  int64_t reach(int axis, int64_t extent) const {
    return (extent - 1) * g.stride[axis] + (g.kernel[axis] - 1) * g.dilation[axis] + 1;
  }

  // With a stride above the kernel's reach some input rows are read by no output.
  bool row_is_read(int64_t row) const {
    if (tiles.winograd) return true;
    for (int64_t k = 0; k < g.kernel[1]; ++k) {
      const int64_t top = row - k * g.dilation[1];
      if (top >= 0 && top % g.stride[1] == 0 && top / g.stride[1] < rows) return true;
    }
    return false;
  }

  void zero_columns(float* row, int64_t begin, int64_t end) const {
    for (int64_t group = 0; group < in_groups; ++group, row += group_stride)
      __builtin_memset(row + begin * LANES, 0, (end - begin) * LANES * sizeof(float));
  }

  static int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
  }
};

template <class T>
void run(const OnePass& p, int64_t begin, int64_t end, float* scratch) {
  Worker<T> worker(p, scratch);
  const int64_t depths = p.g.out[0];
  for (int64_t unit = begin; unit < end; ++unit) {
    if (unit == begin || unit % depths == 0) worker.select_tile(unit / depths);
    worker.compute(unit % depths, unit + 1 == end || (unit + 1) % depths == 0);
  }
}

}  // namespace

const Kernels TUCKER_KERNELS = {TUCKER_ISA, LANES, &run<float>, &run<bfloat16>};

}  // namespace tucker_ops::cpu
