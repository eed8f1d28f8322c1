// A convolution as one matrix product: rows of the left factor are voxels of the output, gathered tap by tap straight from
// memory into fragments, columns are channels of the output. Runs what the one-pass kernel does not: any kernel, stride,
// dilation and number of channels, dense convolutions, and the stages one at a time where ranks are large or maps small.
//
// A block's warps share out rows (kRowWarps) and the taps and groups of channels that are summed up (kSliceWarps): small
// maps have too few rows to fill a GPU otherwise.
#pragma once

#include "stages.cuh"

namespace tucker_ops::cuda {

template <class Math, int kRows_, int kGroups_, int kRowWarps_, int kSliceWarps_, bool kExpands_>
struct Gather {
  using M = Math;
  using Element = typename M::Element;
  using Params = GatherParams;
  static constexpr int kRows = kRows_;      // mma tiles of 16 voxels of a warp
  static constexpr int kGroups = kGroups_;  // groups of columns
  static constexpr int kRowWarps = kRowWarps_, kSliceWarps = kSliceWarps_;
  static constexpr bool kExpands = kExpands_;
  static constexpr int kThreads = 32 * kRowWarps * kSliceWarps, kBlocks = kThreads > 128 ? 1 : 2;
  static constexpr int kTiles = kGroups * M::kGroupTiles, kSteps = 2 * kGroups;
  static constexpr int kBlockVoxels = kRowWarps * kRows * 16, kBlockColumns = kGroups * M::kGroup;
  // Columns are channels of a step where the product goes on into the third stage, else of a group, to be stored.
  static constexpr int kUnit = kExpands ? M::kStep : M::kGroup, kUnitTiles = kUnit / 8;
  static_assert(!kExpands || kSliceWarps == 1, "a third stage begins in the registers of the second");

  static TUCKER_BOTH constexpr int shared_bytes(int channels, bool moments) {
    const int padded = (channels + M::kGroup - 1) / M::kGroup * M::kGroup;
    const int slices = (kSliceWarps - 1) * kRowWarps * kRows * kTiles * 4 * 32 * 4;
    return slices + (moments ? kRowWarps * (kExpands ? padded : kBlockColumns) * WarpMoments::kBytes : 0);
  }

  // Behind what slices and statistics take.
  static TUCKER_DEVICE uint32_t taps_table(const Params& p) {
    return shared_base() + (shared_bytes(kExpands ? p.expansion.channels : p.columns, p.moments != nullptr) + 15) / 16 * 16;
  }

  // The voxel of the output that a row stands for, and where the kernel's first tap reads.
  struct Voxel {
    int out[3], coarse[3];
    bool valid;
  };

  struct Grid {
    int extent[3];  // voxels of this block's class along each axis
    int first;      // of the block, within the class
    int c;          // the class
    int voxels;

    TUCKER_DEVICE explicit Grid(const Params& p) {
      voxels = 1;
      for (int a = 0; a < 3; ++a) voxels *= extent[a] = p.out[a] / p.factor[a];
      const int blocks = (voxels + kBlockVoxels - 1) / kBlockVoxels;
      c = block_index().x / blocks;
      first = block_index().x % blocks * kBlockVoxels;
    }
    TUCKER_DEVICE Voxel at(const Params& p, int row) const {
      Voxel v;
      const int i = first + row;
      v.valid = i < voxels;
      v.coarse[2] = i % extent[2];
      v.coarse[1] = i / extent[2] % extent[1];
      v.coarse[0] = i / extent[2] / extent[1];
      const int of[3] = {c / p.factor[2] / p.factor[1], c / p.factor[2] % p.factor[1], c % p.factor[2]};
      for (int a = 0; a < 3; ++a) v.out[a] = v.coarse[a] * p.factor[a] + of[a];
      return v;
    }
  };

  // For `expand` and stores: voxel l / 4 + 8r of tile t of this warp, l being the lane.
  struct Rows {
    const Params* p;
    const Grid* grid;
    int n, first;  // of the warp, within the class
    int left;      // from this lane's first voxel to the class's end

    TUCKER_DEVICE Rows(const Params& p_, const Grid& grid_, int n_, int warp_first)
        : p(&p_), grid(&grid_), n(n_), first(warp_first + thread_index() % 32 / 4), left(grid_.voxels - grid_.first - first) {}
    TUCKER_DEVICE void forget() { left = opaque(left); }
    TUCKER_DEVICE bool valid(int t, int r) const { return t * 16 + 8 * r < left; }
    TUCKER_DEVICE int64_t index(int t, int r) const {
      // Without classes voxels are counted as they lie.
      if (p->factor[0] * p->factor[1] * p->factor[2] == 1)
        return static_cast<int64_t>(n) * grid->voxels + grid->first + first + t * 16 + 8 * r;
      const Voxel v = grid->at(*p, first + t * 16 + 8 * r);
      return ((static_cast<int64_t>(n) * p->out[0] + v.out[0]) * p->out[1] + v.out[1]) * p->out[2] + v.out[2];
    }
    TUCKER_DEVICE Element* pointer(int t, int r) const { return static_cast<Element*>(p->y) + index(t, r) * p->y_pitch; }
  };

  // Voxels of a warp within the class.
  static TUCKER_DEVICE int count(const Grid& grid, int row_warp) {
    const int left = grid.voxels - grid.first - row_warp * kRows * 16;
    return left < 0 ? 0 : left < kRows * 16 ? left : kRows * 16;
  }

  // A group of all rows, from `channel` on in this lane, times the columns of its weight.
  static TUCKER_DEVICE void multiply_columns(const Params& p, const Source& source, const Element* weight, int columns, int channel,
                                             const Words4 (&x)[kRows][2], float (&c)[kRows][kTiles][4]) {
    const int g = thread_index() % 32 / 4;
    TUCKER_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const int own = columns + tile / kUnitTiles * kUnit + channel_of<M>(kUnit, tile % kUnitTiles, g);
      Words4 column = {};
      if (own < p.columns && channel < source.pitch) column = load16(weight + static_cast<int64_t>(own) * source.pitch + channel);
      TUCKER_UNROLL
      for (int t = 0; t < kRows; ++t) multiply_group<M>(c[t][tile], x[t][0], x[t][1], column);
    }
  }

  static TUCKER_DEVICE void multiply(const Params& p, const Grid& grid, int first, int slice, int columns, float (&c)[kRows][kTiles][4]) {
    const int lane = thread_index() % 32, g = lane / 4, q = lane % 4, n = block_index().z;
    // Of this lane's rows, where the first tap reads; in a volume of one kind of voxel that is the output's own place.
    int base[kRows][2][3];
    bool valid[kRows][2];
    TUCKER_UNROLL
    for (int t = 0; t < kRows; ++t) {
      TUCKER_UNROLL
      for (int r = 0; r < 2; ++r) {
        const Voxel v = grid.at(p, first + t * 16 + g + 8 * r);
        valid[t][r] = v.valid;
        TUCKER_UNROLL
        for (int a = 0; a < 3; ++a) base[t][r][a] = v.out[a] * p.stride[a] - p.padding[a];
      }
    }
    if (p.source[0].taps_within) {
      multiply_taps(p, base, valid, slice, columns, taps_table(p), c);
      return;
    }
    int turn = 0;
    const int taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
    TUCKER_NO_UNROLL
    for (int tap = 0; tap < taps; ++tap) {
      const int shift[3] = {tap / p.kernel[2] / p.kernel[1] * p.dilation[0], tap / p.kernel[2] % p.kernel[1] * p.dilation[1],
                            tap % p.kernel[2] * p.dilation[2]};
      TUCKER_NO_UNROLL
      for (int s = 0; s < p.sources; ++s) {
        const Source& source = p.source[s];
        const auto* weight = static_cast<const Element*>(source.weight) + (source.coarse ? grid.c : tap) * source.tap_stride;
        const bool pending = Activation<M, false>::wanted(source);
        int64_t row[kRows][2];
        bool inside[kRows][2];
        TUCKER_UNROLL
        for (int t = 0; t < kRows; ++t) {
          TUCKER_UNROLL
          for (int r = 0; r < 2; ++r) {
            int at[3];
            TUCKER_UNROLL
            for (int a = 0; a < 3; ++a) {
              at[a] = base[t][r][a] + shift[a];
              if (source.coarse) at[a] /= p.factor[a];
            }
            inside[t][r] = valid[t][r] && at[0] >= 0 && at[0] < source.extent[0] && at[1] >= 0 && at[1] < source.extent[1] &&
                           at[2] >= 0 && at[2] < source.extent[2];
            row[t][r] = (((static_cast<int64_t>(n) * source.extent[0] + at[0]) * source.extent[1] + at[1]) * source.extent[2] + at[2]) * source.spacing;
          }
        }
        TUCKER_NO_UNROLL
        for (int group = 0; group < source.channels; group += M::kGroup) {
          if (kSliceWarps > 1 && turn++ % kSliceWarps != slice) continue;
          const int channel = group + M::kGroup / 4 * q;
          Words4 x[kRows][2] = {};
          TUCKER_UNROLL
          for (int t = 0; t < kRows; ++t) {
            TUCKER_UNROLL
            for (int r = 0; r < 2; ++r) {
              if (inside[t][r]) x[t][r] = load_quarter<M>(source.x, row[t][r], channel, source.channels, source.vectors);
            }
          }
          if (pending) {
            const Activation<M, false> activation(source, n, channel);
            TUCKER_UNROLL
            for (int t = 0; t < kRows; ++t) {
              TUCKER_UNROLL
              for (int r = 0; r < 2; ++r) {
                if (inside[t][r]) activation.apply(x[t][r]);
              }
            }
          }
          multiply_columns(p, source, weight, columns, channel, x, c);
        }
      }
    }
  }

  // Bytes of shared memory for each channel and tap of a source whose taps are summed up with its channels.
  static constexpr int kTapBytes = 16;

  // For each of them: the distance from the kernel's first voxel in elements, (d, h, w) a byte each, scale and shift.
  static TUCKER_DEVICE void fill_taps(const Params& p, uint32_t table) {
    const Source& source = p.source[0];
    const int taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
    for (int k = thread_index(); k < source.channels * taps; k += kThreads) {
      const int channel = k / taps, tap = k % taps;
      const int d = tap / p.kernel[2] / p.kernel[1] * p.dilation[0], h = tap / p.kernel[2] % p.kernel[1] * p.dilation[1],
                w = tap % p.kernel[2] * p.dilation[2];
      const int at = block_index().z * source.channels + channel;
      shared_store8(table + k * kTapBytes, ((d * source.extent[1] + h) * source.extent[2] + w) * source.spacing + channel, d << 16 | h << 8 | w);
      shared_store8(table + k * kTapBytes + 8, as_word(source.scale ? load(source.scale + at) : 1.0f),
                    as_word(source.shift ? load(source.shift + at) : 0.0f));
    }
    barrier();
  }

  // The product of a source of few channels: taps and channels together make the groups, element by element.
  static TUCKER_DEVICE void multiply_taps(const Params& p, const int (&base)[kRows][2][3], const bool (&valid)[kRows][2], int slice,
                                          int columns, uint32_t table, float (&c)[kRows][kTiles][4]) {
    const int q = thread_index() % 4, n = block_index().z;
    const Source& source = p.source[0];
    const bool pending = Activation<M, false>::wanted(source);
    const int count = source.channels * p.kernel[0] * p.kernel[1] * p.kernel[2];
    const Element* first[kRows][2];
    bool whole[kRows][2];  // no tap leaves the volume
    TUCKER_UNROLL
    for (int t = 0; t < kRows; ++t) {
      TUCKER_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int (&at)[3] = base[t][r];
        const int64_t voxel = ((static_cast<int64_t>(n) * source.extent[0] + at[0]) * source.extent[1] + at[1]) * source.extent[2] + at[2];
        first[t][r] = static_cast<const Element*>(source.x) + voxel * source.spacing;
        whole[t][r] = valid[t][r];
        TUCKER_UNROLL
        for (int a = 0; a < 3; ++a) whole[t][r] = whole[t][r] && at[a] >= 0 && at[a] + (p.kernel[a] - 1) * p.dilation[a] < source.extent[a];
      }
    }
    TUCKER_NO_UNROLL
    for (int group = 0; group < count; group += M::kGroup) {
      if (kSliceWarps > 1 && group / M::kGroup % kSliceWarps != slice) continue;
      const int own = group + M::kGroup / 4 * q;
      Words4 x[kRows][2] = {};
      TUCKER_UNROLL
      for (int i = 0; i < M::kChunk; ++i) {
        if (own + i >= count) continue;
        const Words2 place = shared_load8(table + (own + i) * kTapBytes), norm = shared_load8(table + (own + i) * kTapBytes + 8);
        const int d = place.v[1] >> 16, h = place.v[1] >> 8 & 255, w = place.v[1] & 255;
        TUCKER_UNROLL
        for (int t = 0; t < kRows; ++t) {
          TUCKER_UNROLL
          for (int r = 0; r < 2; ++r) {
            const int (&at)[3] = base[t][r];
            const bool inside = whole[t][r] || (valid[t][r] && at[0] + d >= 0 && at[0] + d < source.extent[0] && at[1] + h >= 0 &&
                                                at[1] + h < source.extent[1] && at[2] + w >= 0 && at[2] + w < source.extent[2]);
            if (!inside) continue;
            Element element = load(first[t][r] + static_cast<int>(place.v[0]));
            if (pending) element = element_of<M>(activated(value_of<M>(element), as_float(norm.v[0]), as_float(norm.v[1]), source.slope));
            if constexpr (M::kSize == 2)
              x[t][r].v[i / 2] |= static_cast<uint32_t>(element) << (i % 2 * 16);
            else
              x[t][r].v[i] = as_word(element);
          }
        }
      }
      multiply_columns(p, source, static_cast<const Element*>(source.weight), columns, own, x, c);
    }
  }

  // Sums of the slices, in their order, end up in the first one's registers.
  static TUCKER_DEVICE void add_slices(int row_warp, int slice, float (&c)[kRows][kTiles][4]) {
    constexpr int kPerWarp = kRows * kTiles * 4 * 32 * 4;
    const uint32_t at = shared_base() + row_warp * (kSliceWarps - 1) * kPerWarp + thread_index() % 32 * 4;
    if (slice > 0) {
      TUCKER_UNROLL
      for (int i = 0; i < kRows * kTiles * 4; ++i)
        shared_store4(at + (slice - 1) * kPerWarp + i * 128, as_word(c[i / 4 / kTiles][i / 4 % kTiles][i % 4]));
    }
    barrier();
    if (slice > 0) return;
    TUCKER_NO_UNROLL
    for (int other = 0; other < kSliceWarps - 1; ++other) {
      TUCKER_UNROLL
      for (int i = 0; i < kRows * kTiles * 4; ++i)
        c[i / 4 / kTiles][i / 4 % kTiles][i % 4] += as_float(shared_load4(at + other * kPerWarp + i * 128));
    }
  }

  static TUCKER_DEVICE void store_row(const Params& p, int64_t index, int columns, int group, int r, const float (*tiles)[4]) {
    const int q = thread_index() % 4, own = columns + group * M::kGroup + M::kGroup / 4 * q;
    if (p.y_channel) {
      // Voxels of neighbouring lanes lie side by side.
      const int64_t voxels = static_cast<int64_t>(p.out[0]) * p.out[1] * p.out[2];
      const int64_t first = (index / voxels * p.y_columns + own) * voxels + index % voxels;
      TUCKER_UNROLL
      for (int i = 0; i < M::kChunk; ++i) {
        if (own + i >= p.y_columns) continue;
        const float value = tiles[i / 2][2 * r + i % 2];
        if (p.y_is_float)
          store(static_cast<float*>(p.y) + first + i * voxels, value);
        else
          store(static_cast<Element*>(p.y) + first + i * voxels, element_of<M>(value));
      }
      return;
    }
    const int64_t at = index * p.y_pitch + p.y_column + own;
    if (p.y_is_float) {
      TUCKER_UNROLL
      for (int i = 0; i < M::kChunk; ++i) {
        if (own + i < p.y_columns) store(static_cast<float*>(p.y) + at + i, tiles[i / 2][2 * r + i % 2]);
      }
      return;
    }
    if (p.y_vectors) {
      uint32_t factor[2][4];
      to_factor<M>(tiles, factor[0]);
      to_factor<M>(tiles + M::kStepTiles, factor[1]);
      if (own < p.y_columns) store16(static_cast<Element*>(p.y) + at, Words4{{factor[0][r], factor[0][2 + r], factor[1][r], factor[1][2 + r]}});
      return;
    }
    TUCKER_UNROLL
    for (int i = 0; i < M::kChunk; ++i) {
      if (own + i < p.y_columns) store(static_cast<Element*>(p.y) + at + i, element_of<M>(tiles[i / 2][2 * r + i % 2]));
    }
  }

  // Mean and squared deviations of the warp's values, exactly in two passes, per column.
  static TUCKER_DEVICE void gather_moments(const Rows& rows, int voxels, uint32_t moments, const float (&c)[kRows][kTiles][4]) {
    const int g = thread_index() % 32 / 4, q = thread_index() % 4;
    const float count = static_cast<float>(voxels);
    TUCKER_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      TUCKER_UNROLL
      for (int e = 0; e < 2; ++e) {
        float mean = 0.0f, m2 = 0.0f;
        TUCKER_UNROLL
        for (int t = 0; t < kRows; ++t) {
          TUCKER_UNROLL
          for (int r = 0; r < 2; ++r) mean += rows.valid(t, r) ? c[t][tile][2 * r + e] : 0.0f;
        }
        TUCKER_UNROLL
        for (int mask = 4; mask < 32; mask *= 2) mean += shuffle_xor(mean, mask);
        mean /= count > 0.0f ? count : 1.0f;
        TUCKER_UNROLL
        for (int t = 0; t < kRows; ++t) {
          TUCKER_UNROLL
          for (int r = 0; r < 2; ++r) {
            const float deviation = rows.valid(t, r) ? c[t][tile][2 * r + e] - mean : 0.0f;
            m2 = fmaf(deviation, deviation, m2);
          }
        }
        TUCKER_UNROLL
        for (int mask = 4; mask < 32; mask *= 2) m2 += shuffle_xor(m2, mask);
        const int column = tile / M::kGroupTiles * M::kGroup + channel_of<M>(M::kGroup, tile % M::kGroupTiles, 2 * q + e);
        if (g == 0) {
          shared_store4(moments + (column * 3 + 0) * 4, as_word(count));
          shared_store4(moments + (column * 3 + 1) * 4, as_word(mean));
          shared_store4(moments + (column * 3 + 2) * 4, as_word(m2));
        }
      }
    }
  }

  static TUCKER_DEVICE void run(const Params& p) {
    const int warp = thread_index() / 32, row_warp = warp / kSliceWarps, slice = warp % kSliceWarps;
    const int n = block_index().z, columns = block_index().y * kBlockColumns, first = row_warp * kRows * 16;
    const Grid grid(p);
    if (p.source[0].taps_within) fill_taps(p, taps_table(p));
    float c[kRows][kTiles][4] = {};
    multiply(p, grid, first, slice, columns, c);
    const Rows rows(p, grid, n, first);
    const int channels = kExpands ? p.expansion.channels : p.columns;
    const int padded = kExpands ? (channels + M::kGroup - 1) / M::kGroup * M::kGroup : kBlockColumns;
    const uint32_t all_moments = shared_base() + (kSliceWarps - 1) * kRowWarps * kRows * kTiles * 4 * 32 * 4;
    const uint32_t own_moments = all_moments + row_warp * padded * WarpMoments::kBytes;

    if constexpr (kExpands) {
      uint32_t z[kRows][kSteps][4];
      TUCKER_UNROLL
      for (int t = 0; t < kRows; ++t) {
        TUCKER_UNROLL
        for (int step = 0; step < kSteps; ++step) to_factor<M>(&c[t][step * M::kStepTiles], z[t][step]);
      }
      expand<M>(z, p.expansion, rows, WarpMoments{own_moments, p.moments != nullptr, true});
    } else {
      if constexpr (kSliceWarps > 1) add_slices(row_warp, slice, c);
      if (kSliceWarps == 1 || slice == 0) {
        const int q = thread_index() % 4;
        TUCKER_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          TUCKER_UNROLL
          for (int e = 0; e < 2; ++e) {
            const int column = columns + tile / M::kGroupTiles * M::kGroup + channel_of<M>(M::kGroup, tile % M::kGroupTiles, 2 * q + e);
            if (column >= p.columns) continue;
            const int64_t at = static_cast<int64_t>(n) * p.columns + column;
            const float bias = p.bias ? value_of<M>(load(static_cast<const Element*>(p.bias) + column)) : 0.0f;
            const float scale = p.scale ? load(p.scale + at) : 1.0f, shift = p.shift ? load(p.shift + at) : 0.0f;
            TUCKER_UNROLL
            for (int t = 0; t < kRows; ++t) {
              TUCKER_UNROLL
              for (int r = 0; r < 2; ++r) c[t][tile][2 * r + e] = activated(c[t][tile][2 * r + e] + bias, scale, shift, p.slope);
            }
          }
        }
        TUCKER_UNROLL
        for (int t = 0; t < kRows; ++t) {
          TUCKER_UNROLL
          for (int r = 0; r < 2; ++r) {
            if (!rows.valid(t, r)) continue;
            const int64_t index = rows.index(t, r);
            TUCKER_UNROLL
            for (int group = 0; group < kGroups; ++group) store_row(p, index, columns, group, r, &c[t][group * M::kGroupTiles]);
          }
        }
        if (p.moments) gather_moments(rows, count(grid, row_warp), own_moments, c);
      }
    }
    if (p.moments) store_moments(p, grid, all_moments, columns, channels, padded);
  }

  static TUCKER_DEVICE void store_moments(const Params& p, const Grid& grid, uint32_t moments, int columns, int channels, int padded) {
    barrier();
    const int classes = p.factor[0] * p.factor[1] * p.factor[2];
    const int blocks = classes * ((grid.voxels + kBlockVoxels - 1) / kBlockVoxels);
    for (int i = thread_index(); i < padded && columns + i < channels; i += kThreads) {
      Moments all{0.0f, 0.0f, 0.0f};
      for (int warp = 0; warp < kRowWarps; ++warp) {
        const uint32_t at = moments + (warp * padded + i) * WarpMoments::kBytes;
        const float a = as_float(shared_load4(at)), b = as_float(shared_load4(at + 4)), c = as_float(shared_load4(at + 8));
        if constexpr (kExpands) {
          // A pivot, the deviations from it, their squares.
          const float voxels = static_cast<float>(count(grid, warp));
          if (voxels == 0.0f) continue;
          const float m2 = c - b * b / voxels;
          all = merged(all, {voxels, a + b / voxels, m2 < 0.0f ? 0.0f : m2});
        } else {
          all = merged(all, {a, b, c});
        }
      }
      store(p.moments + (static_cast<int64_t>(block_index().z) * blocks + block_index().x) * channels + columns + i, all);
    }
  }
};

}  // namespace tucker_ops::cuda
