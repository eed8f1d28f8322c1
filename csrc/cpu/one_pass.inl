// The one-pass kernel, in vectors of TUCKER_LANES float32. Included by one file per instruction set.
//
// Everything here has internal linkage and no STL is used: an inline function compiled with wider
// instructions could otherwise be the copy that the linker keeps for the whole program.
//
// Vectors run over channels. An intermediate is stored in groups of LANES channels, [group][voxel][LANES],
// so that the LANES·MR values a block broadcasts lie at constant offsets from one pointer.

#include <cstdint>

#include "one_pass.h"

#if !defined(TUCKER_LANES) || !defined(TUCKER_KERNELS) || !defined(TUCKER_ISA)
#error "define TUCKER_LANES, TUCKER_KERNELS and TUCKER_ISA before including one_pass.inl"
#endif

#define TUCKER_INLINE inline __attribute__((always_inline))

namespace tucker_ops::cpu {
namespace {

constexpr int LANES = TUCKER_LANES;
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float UnalignedVec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

struct bfloat16 {
  uint16_t bits;
};

template <int N>
struct Int {
  static constexpr int value = N;
};

TUCKER_INLINE float to_float(float value) { return value; }
TUCKER_INLINE float to_float(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

// Rounds to nearest, ties to even; a NaN stays one.
TUCKER_INLINE Halves to_bfloat16(Vec value) {
  Bits bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet = (bits >> 16) | 0x40u;
  const Bits is_nan = reinterpret_cast<Bits>(value != value);
  return __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), Halves);
}

TUCKER_INLINE void store_channels(float* y, Vec value, int64_t channels, int64_t stride) {
  if (stride == 1 && channels == LANES) {
    *reinterpret_cast<UnalignedVec*>(y) = value;
    return;
  }
  for (int64_t i = 0; i < channels; ++i) y[i * stride] = value[i];
}

TUCKER_INLINE void store_channels(bfloat16* y, Vec value, int64_t channels, int64_t stride) {
  const Halves halves = to_bfloat16(value);
  if (stride == 1 && channels == LANES) {
    *reinterpret_cast<UnalignedHalves*>(y) = halves;
    return;
  }
  for (int64_t i = 0; i < channels; ++i) y[i * stride].bits = halves[i];
}

// acc[j] += sum over k < n of a[j·LDA + k·step] · w[k]; LDA = 0 takes `lda` instead.
template <int MR, int NV, int LDA, class T>
TUCKER_INLINE void accumulate(Vec (&acc)[MR][NV], const T* a, int64_t lda, int64_t step, int64_t n, const float* w) {
  const int64_t ld = LDA ? LDA : lda;
  for (int64_t k = 0; k < n; ++k) {
    Vec weight[NV];
    for (int v = 0; v < NV; ++v) weight[v] = reinterpret_cast<const Vec*>(w)[v];
    for (int j = 0; j < MR; ++j) {
      const float value = to_float(a[j * ld]);
      for (int v = 0; v < NV; ++v) acc[j][v] += weight[v] * value;
    }
    a += step;
    w += NV * LANES;
  }
}

// Calls f(Int<MR>, start) for blocks of voxels that cover [begin, end). The accumulators of a block fill
// the registers: 12 of 16, or 24 of the 32 that AVX-512 has.
template <int NV, class F>
TUCKER_INLINE void voxel_blocks(int64_t begin, int64_t end, const F& f) {
  constexpr int full = (LANES == 16 || NV == 1) ? 12 : 6;
  int64_t at = begin;
  for (; at + full <= end; at += full) f(Int<full>(), at);
  if (full > 6 && at + 6 <= end) {
    f(Int<6>(), at);
    at += 6;
  }
  switch (end - at) {
    case 5: return f(Int<5>(), at);
    case 4: return f(Int<4>(), at);
    case 3: return f(Int<3>(), at);
    case 2: return f(Int<2>(), at);
    case 1: return f(Int<1>(), at);
  }
}

// Calls f(Int<NV>, first channel) for the blocks in which weights are packed.
template <class F>
TUCKER_INLINE void channel_blocks(int64_t channels, const F& f) {
  for (int64_t c = 0; c < channels; c += 2 * LANES) {
    if (channels - c > LANES) {
      f(Int<2>(), c);
    } else {
      f(Int<1>(), c);
    }
  }
}

template <class T>
struct Worker {
  const OnePass& p;
  const Geometry& g;
  const Tiles& tiles;
  float* const ring;
  float* const plane;
  int64_t* const tags;  // input depth that each slot holds, or -1

  int64_t n = 0, row0 = 0, col0 = 0, rows = 0, cols = 0;  // the tile at work, in output voxels

  const int64_t in_groups, out_groups;
  const int64_t group_stride, row_stride, slot_stride;  // of the ring, in floats

  Worker(const OnePass& pass, float* scratch)
      : p(pass),
        g(pass.g),
        tiles(pass.tiles),
        ring(scratch),
        plane(ring + ring_floats(g, tiles, LANES)),
        tags(reinterpret_cast<int64_t*>(plane + plane_floats(g, tiles, LANES))),
        in_groups(ceil_div(g.rank_in, LANES)),
        out_groups(ceil_div(g.rank_out, LANES)),
        group_stride(tiles.cols_in * LANES),
        row_stride(in_groups * group_stride),
        slot_stride(tiles.rows_in * row_stride) {}

  void select_tile(int64_t index) {
    col0 = index % tiles.col_tiles * tiles.cols;
    row0 = index / tiles.col_tiles % tiles.row_tiles * tiles.rows;
    n = index / (tiles.col_tiles * tiles.row_tiles);
    rows = g.out[1] - row0 < tiles.rows ? g.out[1] - row0 : tiles.rows;
    cols = g.out[2] - col0 < tiles.cols ? g.out[2] - col0 : tiles.cols;
    for (int64_t s = 0; s < tiles.slots; ++s) tags[s] = -1;
  }

  void compute(int64_t depth) {
    for (int64_t k = 0; k < g.kernel[0]; ++k) {
      const int64_t d = depth * g.stride[0] - g.padding[0] + k * g.dilation[0];
      if (d < 0 || d >= g.in[0]) continue;
      const int64_t slot = d % tiles.slots;
      if (tags[slot] == d) continue;
      tags[slot] = d;
      reduce_plane(d, ring + slot * slot_stride);
    }
    convolve_plane(depth);
    expand_plane(depth);
  }

  // First stage: one input plane, u_in · x, zero outside the volume.
  void reduce_plane(int64_t d, float* out) {
    const int64_t rows_in = (rows - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1;
    const int64_t cols_in = (cols - 1) * g.stride[2] + (g.kernel[2] - 1) * g.dilation[2] + 1;
    const int64_t h0 = row0 * g.stride[1] - g.padding[1], w0 = col0 * g.stride[2] - g.padding[2];
    const int64_t begin = clamp(-w0, 0, cols_in), end = clamp(g.in[2] - w0, begin, cols_in);
    for (int64_t row = 0; row < rows_in; ++row, out += row_stride) {
      if (!row_is_read(row)) continue;
      const int64_t h = h0 + row;
      const bool inside = h >= 0 && h < g.in[1];
      zero_columns(out, 0, inside ? begin : cols_in);
      if (!inside) continue;
      zero_columns(out, end, cols_in);
      const T* x = static_cast<const T*>(p.x) + n * p.x_strides.batch + d * p.x_strides.space[0] +
                   h * p.x_strides.space[1] + w0 * p.x_strides.space[2];
      if (p.x_strides.space[2] == 1) {
        reduce_row<1>(x, out, begin, end);
      } else {
        reduce_row<0>(x, out, begin, end);
      }
    }
  }

  template <int LDA>
  void reduce_row(const T* x, float* out, int64_t begin, int64_t end) {
    const int64_t lda = p.x_strides.space[2];
    channel_blocks(g.rank_in, [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      const float* w = p.u_in + c * g.in_channels;
      float* group = out + c / LANES * group_stride;
      voxel_blocks<NV>(begin, end, [&](auto mr, int64_t col) {
        constexpr int MR = decltype(mr)::value;
        Vec acc[MR][NV] = {};
        accumulate<MR, NV, LDA>(acc, x + col * lda, lda, p.x_strides.channel, g.in_channels, w);
        for (int v = 0; v < NV; ++v)
          for (int j = 0; j < MR; ++j)
            *reinterpret_cast<Vec*>(group + v * group_stride + (col + j) * LANES) = acc[j][v];
      });
    });
  }

  // Second stage: one output plane of the tile, core ∗ t.
  void convolve_plane(int64_t depth) {
    if (g.stride[2] == 1) {
      convolve_rows<LANES>(depth);
    } else {
      convolve_rows<0>(depth);
    }
  }

  template <int LDA>
  void convolve_rows(int64_t depth) {
    const int64_t lda = g.stride[2] * LANES;
    const int64_t taps = g.kernel[0] * g.kernel[1] * g.kernel[2];
    channel_blocks(g.rank_out, [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      const float* w0 = p.core + c * taps * g.rank_in;
      for (int64_t row = 0; row < rows; ++row) {
        float* out = plane + row * plane_row() + c * tiles.cols;
        voxel_blocks<NV>(0, cols, [&](auto mr, int64_t col) {
          constexpr int MR = decltype(mr)::value;
          Vec acc[MR][NV] = {};
          const float* w = w0;
          const int64_t w_plane = g.kernel[1] * g.kernel[2] * g.rank_in * NV * LANES;
          for (int64_t kd = 0; kd < g.kernel[0]; ++kd, w += w_plane) {
            const int64_t d = depth * g.stride[0] - g.padding[0] + kd * g.dilation[0];
            if (d < 0 || d >= g.in[0]) continue;
            const float* t = ring + d % tiles.slots * slot_stride + row * g.stride[1] * row_stride +
                             col * g.stride[2] * LANES;
            convolve_taps<MR, NV, LDA>(acc, t, lda, w);
          }
          for (int v = 0; v < NV; ++v)
            for (int j = 0; j < MR; ++j)
              *reinterpret_cast<Vec*>(out + (v * tiles.cols + col + j) * LANES) = acc[j][v];
        });
      }
    });
  }

  template <int MR, int NV, int LDA>
  TUCKER_INLINE void convolve_taps(Vec (&acc)[MR][NV], const float* t, int64_t lda, const float* w) const {
    for (int64_t kh = 0; kh < g.kernel[1]; ++kh) {
      for (int64_t kw = 0; kw < g.kernel[2]; ++kw) {
        const float* a = t + kh * g.dilation[1] * row_stride + kw * g.dilation[2] * LANES;
        for (int64_t r = 0; r < g.rank_in; r += LANES, a += group_stride) {
          const int64_t count = g.rank_in - r < LANES ? g.rank_in - r : LANES;
          accumulate<MR, NV, LDA>(acc, a, lda, 1, count, w);
          w += count * NV * LANES;
        }
      }
    }
  }

  // Third stage: u_out · z + bias, to memory.
  void expand_plane(int64_t depth) {
    const Strides& s = p.y_strides;
    T* y0 = static_cast<T*>(p.y) + n * s.batch + depth * s.space[0] + row0 * s.space[1] + col0 * s.space[2];
    channel_blocks(g.out_channels, [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      const float* w0 = p.u_out + c * g.rank_out;
      for (int64_t row = 0; row < rows; ++row) {
        const float* z = plane + row * plane_row();
        T* out = y0 + row * s.space[1] + c * s.channel;
        voxel_blocks<NV>(0, cols, [&](auto mr, int64_t col) {
          constexpr int MR = decltype(mr)::value;
          Vec acc[MR][NV];
          for (int j = 0; j < MR; ++j)
            for (int v = 0; v < NV; ++v) acc[j][v] = reinterpret_cast<const Vec*>(p.bias + c)[v];
          const float* w = w0;
          for (int64_t r = 0; r < g.rank_out; r += LANES) {
            const int64_t count = g.rank_out - r < LANES ? g.rank_out - r : LANES;
            accumulate<MR, NV, LANES>(acc, z + r * tiles.cols + col * LANES, LANES, 1, count, w);
            w += count * NV * LANES;
          }
          for (int v = 0; v < NV; ++v) {
            const int64_t left = g.out_channels - c - v * LANES;
            const int64_t count = left < LANES ? left : LANES;
            for (int j = 0; j < MR; ++j)
              store_channels(out + v * LANES * s.channel + (col + j) * s.space[2], acc[j][v], count, s.channel);
          }
        });
      }
    });
  }

  int64_t plane_row() const { return out_groups * tiles.cols * LANES; }

  // With a stride above the kernel's reach some input rows are read by no output.
  bool row_is_read(int64_t row) const {
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
    worker.compute(unit % depths);
  }
}

}  // namespace

const Kernels TUCKER_KERNELS = {TUCKER_ISA, LANES, &run<float>, &run<bfloat16>};

}  // namespace tucker_ops::cpu
