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
#if defined(TUCKER_MATRIX)
#include "matrix.inl"
#endif

namespace tucker_ops::cpu {
namespace {

// T: dtype of input and output. U: unit in which channels are multiplied.
template <class T, class U>
struct Worker {
  const OnePass& p;
  const Geometry& g;
  const Tiles& tiles;
  const Scratch at;
  float* const scratch;
  int64_t* const tags;        // input depth that each slot of the ring holds, or -1
  int64_t* const coarse_tags;  // row of each source with smaller extents that is kept, or -1

  int64_t n = 0, row0 = 0, col0 = 0, rows = 0, cols = 0;  // the tile at work, in output voxels
  int64_t rows_read = 0, cols_read = 0;                   // extents of its plane of the first stage's output
  int64_t down = 0, across = 0;                           // its Winograd blocks

#if defined(TUCKER_MATRIX)
  MatrixUnit matrix;
  int64_t matrix_rows = 0, matrix_units = 0;  // voxels and units of input ranks multiplied at a time
#endif

  int64_t ahead_depth = 0, ahead_plane = 0, ahead_planes = 0;  // see fetch_ahead

  const int64_t in_groups, out_groups;
  const int64_t rank_in_units, rank_out_units;
  const int64_t z_cols, z_row;  // columns, and units in a row, of the plane of the second stage's output

  Worker(const OnePass& pass, float* memory)
      : p(pass),
        g(pass.g),
        tiles(pass.tiles),
        at(scratch_of(g, tiles, {LANES, kChannels<U>})),
        scratch(memory),
        tags(reinterpret_cast<int64_t*>(scratch + at.tags)),
        coarse_tags(tags + tiles.slots),
        in_groups(ceil_div(g.rank_in, LANES)),
        out_groups(ceil_div(g.rank_out, LANES)),
        rank_in_units(ceil_div(g.rank_in, kChannels<U>)),
        rank_out_units(ceil_div(g.rank_out, kChannels<U>)),
        z_cols(tiles.winograd ? ceil_div(tiles.cols, tiles.winograd) * tiles.winograd : tiles.cols),
        z_row(out_groups * z_cols * kUnits<U>) {}

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
    for (int64_t s = 0; s < tiles.slots + kMostSources; ++s) tags[s] = -1;
#if defined(TUCKER_MATRIX)
    select_matrix();
#endif
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
        reduce_plane(d, reinterpret_cast<U*>(ring));
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
      default:
        if (g.convolved) convolve_plane(depth);
    }
    expand_plane(depth);
  }

  // Units between groups and rows of a plane of the first stage's output, which is stored as S.
  template <class S>
  int64_t group_stride() const {
    return tiles.cols_in * kUnits<S>;
  }
  template <class S>
  int64_t row_stride() const {
    return in_groups * group_stride<S>();
  }

  // First stage: one input plane, the sum of reduce · source, zero outside the volume and where no output needs it.
  template <class S>
  void reduce_plane(int64_t d, S* out) {
    const int64_t rows_needed = reach(1, rows), cols_needed = reach(2, cols);
    const int64_t h0 = row0 * g.stride[1] - g.padding[1], w0 = col0 * g.stride[2] - g.padding[2];
    const int64_t begin = clamp(-w0, 0, cols_needed), end = clamp(g.in[2] - w0, begin, cols_needed);
    for (int64_t row = 0; row < rows_read; ++row, out += row_stride<S>()) {
      if (!row_is_read(row)) continue;
      const int64_t h = h0 + row;
      const bool inside = row < rows_needed && h >= 0 && h < g.in[1];
      zero_columns(out, 0, inside ? begin : cols_read);
      if (!inside) continue;
      zero_columns(out, end, cols_read);
      for (int64_t col = begin; col < end; col += kColumns)
        read_sources(d, h, w0 + col, end - col < kColumns ? end - col : kColumns, out + col * kUnits<S>);
    }
  }

  // Columns w to w + count of the first stage's output.
  template <class S>
  void read_sources(int64_t d, int64_t h, int64_t w, int64_t count, S* out) {
    const Source& s = p.sources[0];
    if (p.source_count == 1 && !is_coarse(s)) {
      const T* x = at_voxel(s, d, h, w);
      return first_stage(s, x, count, out, group_stride<S>(), kUnits<S>);
    }
    if constexpr (kChannels<S> == 1) {
      sum_sources(d, h, w, count, out, group_stride<S>());
    } else {
      float* const sums = scratch + at.sums;
      sum_sources(d, h, w, count, sums, kColumns * LANES);
      for (int64_t group = 0; group < in_groups; ++group)
        for (int64_t j = 0; j < count; ++j)
          store(out + group * group_stride<S>() + j * kUnits<S>, load(sums + (group * kColumns + j) * LANES));
    }
  }

  void sum_sources(int64_t d, int64_t h, int64_t w, int64_t count, float* out, int64_t group_step) {
    for (int64_t i = 0; i < p.source_count; ++i) {
      const Source& s = p.sources[i];
      float* const to = out + s.offset / LANES * group_step;
      if (!is_coarse(s)) {
        first_stage(s, at_voxel(s, d, h, w), count, to, group_step, LANES);
        continue;
      }
      const int64_t f = s.factor[2];
      int64_t lda, begin;
      const U* row = coarse_row(i, d, h, lda, begin);
      // Every f-th column takes the same matrix.
      for (int64_t first = 0; first < f && first < count; ++first) {
        const int64_t column = w + first, matrix = (d % s.factor[0] * s.factor[1] + h % s.factor[1]) * f + column % f;
        reduce_columns<0>(s, row + (column / f - begin) * lda, lda, 1, s.reduce + matrix * s.reduce_floats,
                          ceil_div(count - first, f), to + first * LANES, group_step, f * LANES);
      }
    }
  }

  // What the tile needs of a row of source `index`, from its column `begin` on. Kept, because several rows of the input
  // read the same one.
  const U* coarse_row(int64_t index, int64_t d, int64_t h, int64_t& lda, int64_t& begin) {
    const Source& s = p.sources[index];
    const int64_t w0 = col0 * g.stride[2] - g.padding[2], f = s.factor[2];
    begin = clamp(w0, 0, g.in[2]) / f;
    const int64_t end = ceil_div(clamp(w0 + reach(2, cols), 0, g.in[2]), f);
    const T* x = at_voxel(s, d, h, begin * f);
    const int64_t space = s.strides.space[2];
    if (is_read_in_place(s)) {
      lda = space / kChannels<U>;
      return reinterpret_cast<const U*>(x);
    }
    U* kept = reinterpret_cast<U*>(scratch + at.coarse);
    for (int64_t i = 0; i < index; ++i)
      if (is_coarse(p.sources[i])) kept += ceil_div(p.sources[i].channels, kMostLanes) * kMostLanes * (tiles.cols_in + 1);
    lda = ceil_div(s.channels, LANES) * kUnits<U>;
    const int64_t tag = d / s.factor[0] * g.in[1] + h / s.factor[1];
    if (coarse_tags[index] == tag) return kept;
    coarse_tags[index] = tag;
    for (int64_t col = begin; col < end; col += kColumns, x += kColumns * space)
      copy_columns(s, x, end - col < kColumns ? end - col : kColumns, kept + (col - begin) * lda, lda);
    return kept;
  }

  const T* at_voxel(const Source& s, int64_t d, int64_t h, int64_t w) const {
    return static_cast<const T*>(s.x) + n * s.strides.batch + d / s.factor[0] * s.strides.space[0] +
           h / s.factor[1] * s.strides.space[1] + w / s.factor[2] * s.strides.space[2];
  }

  // `count` voxels of a source at full extents from x on, as its part of the first stage's output.
  template <class S>
  void first_stage(const Source& s, const T* x, int64_t count, S* out, int64_t group_step, int64_t step_out) {
    if (!s.reduce) {
      ready_source(s, x, count, out, group_step, step_out);
      if (p.in_bias) add_in_bias(s, count, out, group_step, step_out);
      return;
    }
    int64_t lda, step;
    const U* a = read_columns(s, x, count, lda, step);
    if (lda == 1) {
      reduce_columns<1>(s, a, lda, step, s.reduce, count, out, group_step, step_out);
    } else {
      reduce_columns<0>(s, a, lda, step, s.reduce, count, out, group_step, step_out);
    }
  }

  template <class S>
  void add_in_bias(const Source& s, int64_t count, S* out, int64_t group_step, int64_t step_out) const {
    for (int64_t c = 0; c < s.rows; c += LANES, out += group_step)
      for (int64_t j = 0; j < count; ++j)
        store(out + j * step_out, load(out + j * step_out) + load(p.in_bias + s.offset + c));
  }

  static int64_t units_of(const Source& s) { return ceil_div(s.channels, kChannels<U>); }

  // Voxels in units: in place where channels lie together as units and nothing is pending, else copied. A copy reads
  // each cache line once; read in place, channels that lie apart may all compete for the same few sets of the cache.
  const U* read_columns(const Source& s, const T* x, int64_t count, int64_t& lda, int64_t& step) {
    const int64_t space = s.strides.space[2], channel = s.strides.channel, units = units_of(s);
    U* line = reinterpret_cast<U*>(scratch + at.line);
    if (channel == 1) {
      step = 1;
      if (is_read_in_place(s)) {
        lda = space / kChannels<U>;
        return reinterpret_cast<const U*>(x);
      }
      lda = ceil_div(s.channels, LANES) * kUnits<U>;
      copy_columns(s, x, count, line, lda);
      return line;
    }
    lda = 1;
    step = kColumns + 16;
    for (int64_t k = 0; k < units; ++k, line += step) {
      const T* from = x + k * kChannels<U> * channel;
      const bool alone = (k + 1) * kChannels<U> > s.channels;
      interleave(from, alone ? nullptr : from + channel, space, count, line);
    }
    return reinterpret_cast<U*>(scratch + at.line);
  }

  bool is_read_in_place(const Source& s) const {
    return is_ready(s) && s.strides.channel == 1 && sizeof(T) * kChannels<U> == sizeof(U) &&
           s.channels % kChannels<U> == 0 && s.strides.space[2] % kChannels<U> == 0;
  }

  // Voxels that lie apart by `lda` units, their channels together.
  void copy_columns(const Source& s, const T* x, int64_t count, U* line, int64_t lda) {
    if (!is_ready(s)) return ready_source(s, x, count, line, kUnits<U>, lda);
    for (int64_t j = 0; j < count; ++j) gather(x + j * s.strides.space[2], s.channels, line + j * lda);
  }

  // The norm and LeakyReLU that source `s` still has before it, for NV vectors of channels from c on. A NaN stays one.
  template <int NV>
  struct Activation {
    Vec scale[NV], shift[NV];
    const float slope;

    TUCKER_INLINE Activation(const Source& s, int64_t n, int64_t c) : slope(s.slope) {
      for (int v = 0; v < NV; ++v, c += LANES) {
        scale[v] = s.scale ? load_lanes(s.scale + n * s.channels + c, s.channels - c) : Vec{} + 1.0f;
        shift[v] = s.shift ? load_lanes(s.shift + n * s.channels + c, s.channels - c) : Vec{};
      }
    }

    TUCKER_INLINE Vec operator()(Vec value, int v) const {
      value = value * scale[v] + shift[v];
      return value > 0 ? value : value * slope;
    }
  };

  // A source that holds channels, normed and activated. Vectors of channels go to `group_step` apart, voxels to `step`
  // apart; the last vector is filled up with zeros.
  template <class S>
  void activate_source(const Source& s, const T* x, int64_t count, S* out, int64_t group_step, int64_t step) const {
    const int64_t left = s.channels % LANES, whole = s.channels - left;
    int64_t c = 0;
    for (; c + 4 * LANES <= whole; c += 4 * LANES) activate_vectors<4>(s, x, c, count, out + c / LANES * group_step, group_step, step);
    for (; c < whole; c += LANES) activate_vectors<1>(s, x, c, count, out + c / LANES * group_step, group_step, step);
    if (!left) return;
    const Activation<1> activation(s, n, c);
    for (int64_t j = 0; j < count; ++j)
      store(out + c / LANES * group_step + j * step, activation(load_lanes(x + j * s.strides.space[2] + c, left), 0));
  }

  template <int NV, class S>
  TUCKER_INLINE void activate_vectors(const Source& s, const T* x, int64_t c, int64_t count, S* out, int64_t group_step,
                                      int64_t step) const {
    const Activation<NV> activation(s, n, c);
    x += c;
    for (int64_t j = 0; j < count; ++j, x += s.strides.space[2], out += step)
      for (int v = 0; v < NV; ++v) store(out + v * group_step, activation(load(x + v * LANES), v));
  }

  // A source in rank space: expand · x, normed and activated. Vectors of channels go to `group_step` apart, voxels to
  // `step` apart.
  template <class S>
  void expand_source(const Source& s, const T* x, int64_t count, S* out, int64_t group_step, int64_t step) {
    const int64_t space = s.strides.space[2], units = ceil_div(s.width, kChannels<U>);
    const U* a = reinterpret_cast<const U*>(x);
    int64_t lda = space / kChannels<U>;
    if (sizeof(T) * kChannels<U> != sizeof(U) || s.width % kChannels<U> || space % kChannels<U>) {
      U* const line = reinterpret_cast<U*>(scratch + at.ranks);
      lda = units;
      for (int64_t j = 0; j < count; ++j) gather(x + j * space, s.width, line + j * lda);
      a = line;
    }
    channel_blocks(s.channels, [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      const Activation<NV> activation(s, n, c);
      S* const block = out + c / LANES * group_step;
      voxel_blocks<NV>(0, count, [&](auto mr, int64_t col) {
        constexpr int MR = decltype(mr)::value;
        Vec acc[MR][NV] = {};
        accumulate<MR, NV, 0>(acc, a + col * lda, lda, 1, units, s.expand + c * units);
        for (int j = 0; j < MR; ++j)
          for (int v = 0; v < NV; ++v) store(block + v * group_step + (col + j) * step, activation(acc[j][v], v));
      });
    });
  }

  // All channels of voxels, ready to be multiplied.
  template <class S>
  void ready_source(const Source& s, const T* x, int64_t count, S* out, int64_t group_step, int64_t step) {
    if (s.expand) return expand_source(s, x, count, out, group_step, step);
    activate_source(s, x, count, out, group_step, step);
  }

  // All channels of one voxel.
  static void gather(const T* x, int64_t channels, float* out) { widen(x, channels, out); }
  static void gather(const bfloat16* x, int64_t channels, Pair* out) {
    out[(channels - 1) / 2].bits = 0;
    __builtin_memcpy(out, x, channels * sizeof(bfloat16));
  }

  // One unit of channels, `space` apart: the second channel is null where there is none.
  static TUCKER_INLINE void interleave(const T* x, const T*, int64_t space, int64_t count, float* out) {
    if (space == 1) return widen(x, count, out);
    for (int64_t j = 0; j < count; ++j) out[j] = to_float(x[j * space]);
  }
  static TUCKER_INLINE void interleave(const bfloat16* first, const bfloat16* second, int64_t space, int64_t count,
                                       Pair* out) {
    for (int64_t j = 0; j < count; ++j)
      out[j].bits = first[j * space].bits | (second ? static_cast<uint32_t>(second[j * space].bits) << 16 : 0);
  }

  // Where it does not add to what other sources left, it starts from in_bias.
  template <int LDA, class S>
  void reduce_columns(const Source& s, const U* a, int64_t lda, int64_t step, const float* matrix, int64_t count, S* out,
                      int64_t group_step, int64_t step_out) {
    const int64_t units = units_of(s);
    channel_blocks(s.rows, [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      const float* w = matrix + c * units;
      S* group = out + c / LANES * group_step;
      voxel_blocks<NV>(0, count, [&](auto mr, int64_t col) {
        constexpr int MR = decltype(mr)::value;
        Vec acc[MR][NV] = {};
        S* to = group + col * step_out;
        if (s.adds) {
          if constexpr (kChannels<S> == 1)
            for (int v = 0; v < NV; ++v)
              for (int j = 0; j < MR; ++j) acc[j][v] = load(to + v * group_step + j * step_out);
        } else if (p.in_bias) {
          for (int v = 0; v < NV; ++v)
            for (int j = 0; j < MR; ++j) acc[j][v] = load(p.in_bias + s.offset + c + v * LANES);
        }
        accumulate<MR, NV, LDA>(acc, a + col * lda, lda, step, units, w);
        for (int v = 0; v < NV; ++v)
          for (int j = 0; j < MR; ++j) store(to + v * group_step + j * step_out, acc[j][v]);
      });
    });
  }

  // Second stage, directly: one output plane of the tile, core ∗ t.
  void convolve_plane(int64_t depth) {
#if defined(TUCKER_MATRIX)
    if (matrix_units) return multiply_rows(depth);
#endif
    switch (g.stride[2]) {
      case 1: return convolve_rows<kUnits<U>>(depth);
      case 2: return convolve_rows<2 * kUnits<U>>(depth);
      default: return convolve_rows<0>(depth);
    }
  }

  template <int LDA>
  void convolve_rows(int64_t depth) {
    const int64_t lda = g.stride[2] * kUnits<U>;
    const int64_t plane_taps = g.kernel[1] * g.kernel[2];
    channel_blocks(g.rank_out, [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      const float* w0 = p.core + c * g.kernel[0] * plane_taps * rank_in_units;
      for (int64_t row = 0; row < rows; ++row) {
        if (c == 0) fetch_ahead(row, rows);
        U* out = z_plane() + row * z_row + c / LANES * z_cols * kUnits<U>;
        voxel_blocks<NV>(0, cols, [&](auto mr, int64_t col) {
          constexpr int MR = decltype(mr)::value;
          Vec acc[MR][NV] = {};
          const float* w = w0;
          for (int64_t k = 0; k < g.kernel[0]; ++k, w += plane_taps * rank_in_units * NV * LANES) {
            const int64_t d = depth_of(depth, k);
            if (d < 0 || d >= g.in[0]) continue;
            const U* t = reinterpret_cast<const U*>(scratch + d % tiles.slots * at.slot) +
                         row * g.stride[1] * row_stride<U>() + col * lda;
            convolve_taps<MR, NV, LDA>(acc, t, lda, w);
          }
          for (int v = 0; v < NV; ++v)
            for (int j = 0; j < MR; ++j) store(out + (v * z_cols + col + j) * kUnits<U>, acc[j][v]);
        });
      }
    });
  }

  template <int MR, int NV, int LDA>
  TUCKER_INLINE void convolve_taps(Vec (&acc)[MR][NV], const U* t, int64_t lda, const float* w) const {
    for (int64_t kh = 0; kh < g.kernel[1]; ++kh) {
      for (int64_t kw = 0; kw < g.kernel[2]; ++kw) {
        const U* a = t + kh * g.dilation[1] * row_stride<U>() + kw * g.dilation[2] * kUnits<U>;
        w = accumulate_groups<MR, NV, LDA>(acc, a, lda, group_stride<U>(), rank_in_units, w);
      }
    }
  }

#if defined(TUCKER_MATRIX)
  // Where ranks fill whole rows of a register, and voxels do not lie so far apart that the last rows of a register,
  // read past the end of a row of the ring, would lie outside of scratch memory.
  void select_matrix() {
    matrix_units = tiles.winograd || g.stride[2] > 2 ? 0 : rank_in_units % 8 == 0 ? 8 : rank_in_units % 4 == 0 ? 4 : 0;
    if (!matrix_units) return;
    matrix_rows = ceil_div(cols, ceil_div(cols, kMatrixRows));
    matrix.configure(matrix_rows, matrix_units);
  }

  // Second stage, directly, in the registers of matrix.inl: the same weights, the same ring.
  void multiply_rows(int64_t depth) {
    channel_blocks(g.rank_out, [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      for (int64_t row = 0; row < rows; ++row) {
        if (c == 0) fetch_ahead(row, rows);
        U* out = z_plane() + row * z_row + c / LANES * z_cols * kUnits<U>;
        for (int64_t col = 0; col < cols; col += 2 * matrix_rows) {
          if (cols - col > matrix_rows) {
            multiply_voxels<2, NV>(depth, row, col, c, out);
          } else {
            multiply_voxels<1, NV>(depth, row, col, c, out);
          }
        }
      }
    });
  }

  // M blocks of voxels × NV vectors of channels.
  template <int M, int NV>
  TUCKER_INLINE void multiply_voxels(int64_t depth, int64_t row, int64_t col, int64_t c, U* out) {
    const int64_t lda = g.stride[2] * kUnits<U>, between = lda * sizeof(U);
    const float* w = p.core + c * g.kernel[0] * g.kernel[1] * g.kernel[2] * rank_in_units;
    matrix.template zero<0>();
    matrix.template zero<1>();
    matrix.template zero<2>();
    matrix.template zero<3>();
    for (int64_t k = 0; k < g.kernel[0]; ++k) {
      const int64_t d = depth_of(depth, k);
      if (d < 0 || d >= g.in[0]) {
        w += g.kernel[1] * g.kernel[2] * rank_in_units * NV * LANES;
        continue;
      }
      const U* plane = reinterpret_cast<const U*>(scratch + d % tiles.slots * at.slot) +
                       row * g.stride[1] * row_stride<U>() + col * lda;
      for (int64_t kh = 0; kh < g.kernel[1]; ++kh) {
        for (int64_t kw = 0; kw < g.kernel[2]; ++kw) {
          const U* tap = plane + kh * g.dilation[1] * row_stride<U>() + kw * g.dilation[2] * kUnits<U>;
          for (int64_t unit = 0; unit < rank_in_units; unit += matrix_units, w += matrix_units * NV * LANES) {
            const U* a = tap + unit / kUnits<U> * group_stride<U>() + unit % kUnits<U>;
            multiply_taps<M, NV>(a, matrix_rows * lda, between, w);
          }
        }
      }
    }
    store_sums<0>(out, col);
    if constexpr (NV == 2) store_sums<1>(out + z_cols * kUnits<U>, col);
    if constexpr (M == 2) store_sums<2>(out, col + matrix_rows);
    if constexpr (M == 2 && NV == 2) store_sums<3>(out + z_cols * kUnits<U>, col + matrix_rows);
  }

  template <int M, int NV>
  TUCKER_INLINE void multiply_taps(const U* a, int64_t next_voxels, int64_t between, const float* w) {
    constexpr int voxels = kVoxelRegister, weights = kWeightRegister;
    matrix.template load<weights>(w, NV * LANES * sizeof(float));
    if constexpr (NV == 2) matrix.template load<weights + 1>(w + LANES, NV * LANES * sizeof(float));
    matrix.template load<voxels>(a, between);
    matrix.template multiply_add<0, voxels, weights>();
    if constexpr (NV == 2) matrix.template multiply_add<1, voxels, weights + 1>();
    if constexpr (M == 2) {
      matrix.template load<voxels + 1>(a + next_voxels, between);
      matrix.template multiply_add<2, voxels + 1, weights>();
      if constexpr (NV == 2) matrix.template multiply_add<3, voxels + 1, weights + 1>();
    }
  }

  template <int SUMS>
  TUCKER_INLINE void store_sums(U* out, int64_t col) {
    alignas(64) float sums[kMatrixRows * LANES];
    matrix.template store<SUMS>(sums);
    const int64_t count = cols - col < matrix_rows ? cols - col : matrix_rows;
    for (int64_t j = 0; j < count; ++j) store(out + (col + j) * kUnits<U>, load(sums + j * LANES));
  }
#endif

  // Second stage by Winograd: the first stage's plane to points in the ring, …
  template <int M>
  void transform_plane(float* ring) {
    const float* plane = scratch + at.plane;
    for (int64_t i = 0; i < down; ++i)
      for (int64_t group = 0; group < in_groups; ++group)
        for (int64_t j = 0; j < across; ++j)
          transform_input<M>(plane + i * M * row_stride<float>() + group * group_stride<float>() + j * M * LANES,
                             row_stride<float>(), ring + ((group * down + i) * across + j) * LANES, at.point_in);
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
                              z_plane() + i * M * z_row + (group * z_cols + j * M) * kUnits<U>, z_row);
  }

  // Third stage: u_out · z + bias, or z + bias, to memory.
  void expand_plane(int64_t depth) {
    if (p.y_is_float) {
      expand_plane_to(static_cast<float*>(p.y), depth);
    } else {
      expand_plane_to(static_cast<T*>(p.y), depth);
    }
  }

  template <class Out>
  void expand_plane_to(Out* y, int64_t depth) {
    const Strides& s = p.y_strides;
    y += n * s.batch + depth * s.space[0] + row0 * s.space[1] + col0 * s.space[2];
    float* const line = scratch + at.line;
    for (int64_t row = 0; row < rows; ++row, y += s.space[1]) {
      if (!g.convolved) fetch_ahead(row, rows);
      for (int64_t col = 0; col < cols; col += kColumns) {
        const int64_t count = cols - col < kColumns ? cols - col : kColumns;
        const U* z = z_plane() + row * z_row + col * kUnits<U>;
        if (s.channel == 1) {
          expand_columns(z, count, y + col * s.space[2], s.space[2], 1, row * cols + col);
        } else {
          expand_columns(z, count, line, LANES, kColumns, row * cols + col);
          write_columns(line, count, y + col * s.space[2]);
        }
        if (p.stats && g.covariance) observe_products(z, count, row * cols + col);
      }
    }
  }

  // Column j of channel c, a multiple of LANES, goes to out + j · column + c · channel. `seen`: voxels before these.
  template <class Out>
  TUCKER_INLINE void expand_columns(const U* z, int64_t count, Out* out, int64_t column, int64_t channel,
                                    int64_t seen) {
    const int64_t out_channels = g.out_channels, units = rank_out_units, group = z_cols * kUnits<U>;
    channel_blocks(out_channels, [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      const float* const w = p.u_out + c * units;
      const Vec* const bias = reinterpret_cast<const Vec*>(p.bias + c);
      // Scratch is padded to full vectors, the user's memory is not.
      const bool whole = channel != 1 || out_channels - c >= NV * LANES;
      Out* const block = out + c * channel;
      voxel_blocks<NV>(0, count, [&](auto mr, int64_t col) {
        constexpr int MR = decltype(mr)::value;
        Vec acc[MR][NV];
        for (int j = 0; j < MR; ++j)
          for (int v = 0; v < NV; ++v) acc[j][v] = bias[v];
        if (p.u_out) {
          accumulate_groups<MR, NV, kUnits<U>>(acc, z + col * kUnits<U>, kUnits<U>, group, units, w);
        } else {
          const U* from = z + c / LANES * group + col * kUnits<U>;
          for (int j = 0; j < MR; ++j)
            for (int v = 0; v < NV; ++v) acc[j][v] += load(from + v * group + j * kUnits<U>);
        }
        if (p.stats && !g.covariance) observe<MR, NV>(acc, c, seen + col);
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

  // Merges MR more values a channel into mean and sum of squared deviations of the `seen` before (Chan, Golub and
  // LeVeque 1983, eq. 2.1): large common values cancel before anything is squared.
  template <int MR, int NV>
  TUCKER_INLINE void observe(const Vec (&values)[MR][NV], int64_t c, int64_t seen) {
    const float share = static_cast<float>(MR) / static_cast<float>(seen + MR);
    const float cross = static_cast<float>(seen) * share;
    for (int v = 0; v < NV; ++v) {
      float* const at_mean = scratch + at.stats + c + v * LANES;
      float* const at_m2 = at_mean + p.stats_channels;
      Vec sum = values[0][v];
      for (int j = 1; j < MR; ++j) sum += values[j][v];
      const Vec mean = sum * (1.0f / MR);
      Vec m2 = {};
      for (int j = 0; j < MR; ++j) {
        const Vec deviation = values[j][v] - mean;
        m2 += deviation * deviation;
      }
      if (seen == 0) {
        store(at_mean, mean);
        store(at_m2, m2);
      } else {
        const Vec before = load(at_mean), delta = mean - before;
        store(at_mean, before + delta * share);
        store(at_m2, load(at_m2) + m2 + delta * delta * cross);
      }
    }
  }

  // The same for products of deviations of two channels, from `count` voxels of the second stage's output: sums over
  // deviations from the mean of these, and one row more for how far that mean lies from the one before.
  void observe_products(const U* z, int64_t count, int64_t seen) {
    constexpr int64_t group = (kColumns + 1) * LANES;
    constexpr int R = 4;  // rows at a time; with two vectors of columns as many sums as hide their latency
    float* const mean = scratch + at.stats;
    float* const products = mean + p.stats_channels;
    float* const line = scratch + at.line;
    const float share = static_cast<float>(count) / static_cast<float>(seen + count);
    const float root = __builtin_sqrtf(static_cast<float>(seen) * share);
    if (seen == 0) __builtin_memset(mean, 0, stats_floats(g, p.stats_channels) * sizeof(float));
    for (int64_t i = 0; i < out_groups; ++i, z += z_cols * kUnits<U>) {
      float* const to = line + i * group;
      const Vec bias = load(p.bias + i * LANES), before = load(mean + i * LANES);
      Vec sum = {};
      for (int64_t j = 0; j < count; ++j) sum += load(z + j * kUnits<U>) + bias;
      const Vec here = sum * (1.0f / static_cast<float>(count)), delta = here - before;
      for (int64_t j = 0; j < count; ++j) store(to + j * LANES, load(z + j * kUnits<U>) + bias - here);
      store(to + count * LANES, delta * root);
      store(mean + i * LANES, seen == 0 ? here : before + delta * share);
    }
    const int64_t entries = count + (seen ? 1 : 0);
    for (int64_t row = 0; row < g.out_channels; row += R) {
      const float* const a = line + row / LANES * group + row % LANES;
      const int64_t begin = row / (2 * LANES) * 2 * LANES;
      channel_blocks(g.out_channels - begin, [&](auto nv, int64_t c) {
        constexpr int NV = decltype(nv)::value;
        const float* const b = line + (begin + c) / LANES * group;
        float* const to = products + row * p.stats_channels + begin + c;
        Vec acc[R][NV];
        for (int j = 0; j < R; ++j)
          for (int v = 0; v < NV; ++v) acc[j][v] = load(to + j * p.stats_channels + v * LANES);
        for (int64_t k = 0; k < entries; ++k)
          for (int j = 0; j < R; ++j)
            for (int v = 0; v < NV; ++v) acc[j][v] += load(b + v * group + k * LANES) * a[k * LANES + j];
        for (int j = 0; j < R; ++j)
          for (int v = 0; v < NV; ++v) store(to + j * p.stats_channels + v * LANES, acc[j][v]);
      });
    }
  }

  void write_stats(int64_t unit) const {
    const int64_t floats = stats_floats(g, p.stats_channels);
    if (p.stats) __builtin_memcpy(p.stats + unit * floats, scratch + at.stats, floats * sizeof(float));
  }

  // [group][kColumns][LANES] to channels that lie apart.
  template <class Out>
  void write_columns(const float* line, int64_t count, Out* y) {
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
    const int64_t rows_needed = reach(1, rows), rows_ahead = ahead_planes * rows_needed;
    const int64_t items = rows + p.source_count * rows_ahead;
    for (int64_t item = step * items / steps; item < (step + 1) * items / steps; ++item) {
      if (item < rows) {
        const Strides& s = p.y_strides;
        const int64_t bytes = p.y_is_float ? sizeof(float) : sizeof(T);
        const int64_t at_row = n * s.batch + ahead_depth * s.space[0] + (row0 + item) * s.space[1] + col0 * s.space[2];
        fetch_row<1>(static_cast<const char*>(p.y) + at_row * bytes, bytes, s, cols, g.out_channels);
        continue;
      }
      const Source& source = p.sources[(item - rows) / rows_ahead];
      const int64_t ahead = (item - rows) % rows_ahead;
      const int64_t d = ahead_plane + ahead / rows_needed;
      const int64_t h = row0 * g.stride[1] - g.padding[1] + ahead % rows_needed;
      if (d % source.factor[0] || h % source.factor[1]) continue;
      const int64_t w0 = col0 * g.stride[2] - g.padding[2];
      const int64_t begin = clamp(w0, 0, g.in[2]), end = clamp(w0 + reach(2, cols), 0, g.in[2]);
      if (h < 0 || h >= g.in[1] || begin >= end) continue;
      fetch_row<0>(reinterpret_cast<const char*>(at_voxel(source, d, h, begin)), sizeof(T), source.strides,
                   ceil_div(end - begin, source.factor[2]), source.width);
    }
  }

  template <int WRITE>
  static TUCKER_INLINE void fetch_row(const char* row, int64_t size, const Strides& s, int64_t count, int64_t channels) {
    const bool last = s.channel == 1;
    if (!last && s.space[2] != 1) return;
    const int64_t runs = last ? 1 : channels, bytes = (last ? (count - 1) * s.space[2] + channels : count) * size;
    for (int64_t run = 0; run < runs; ++run) {
      const char* p = row + run * s.channel * size;
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at, WRITE, 2);
      __builtin_prefetch(p + bytes - 1, WRITE, 2);
    }
  }

  // Without a second stage the ring's only plane, which has the same layout.
  U* z_plane() const { return reinterpret_cast<U*>(g.convolved ? scratch + at.z : scratch); }

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

  template <class S>
  void zero_columns(S* row, int64_t begin, int64_t end) const {
    for (int64_t group = 0; group < in_groups; ++group, row += group_stride<S>())
      __builtin_memset(row + begin * kUnits<S>, 0, (end - begin) * kUnits<S> * sizeof(S));
  }

  static int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
  }
};

template <class T, class U>
void run(const OnePass& p, int64_t begin, int64_t end, float* scratch) {
  Worker<T, U> worker(p, scratch);
  const int64_t depths = p.g.out[0];
  for (int64_t unit = begin; unit < end; ++unit) {
    if (unit == begin || unit % depths == 0) worker.select_tile(unit / depths);
    worker.compute(unit % depths, unit + 1 == end || (unit + 1) % depths == 0);
    worker.write_stats(unit);
  }
}

}  // namespace

#if defined(TUCKER_MATRIX)
const Kernels TUCKER_KERNELS = {TUCKER_ISA, LANES, nullptr, nullptr, &run<bfloat16, Pair>, true};
#elif defined(TUCKER_PAIRS)
const Kernels TUCKER_KERNELS = {TUCKER_ISA, LANES, nullptr, nullptr, &run<bfloat16, Pair>, false};
#else
const Kernels TUCKER_KERNELS = {TUCKER_ISA, LANES, &run<float, float>, &run<bfloat16, float>, nullptr, false};
#endif

}  // namespace tucker_ops::cpu
