// What the kernels share: reading a row of a source with its norm and activation, and writing u_out · z with statistics.
#pragma once

#include "math.cuh"
#include "params.h"

namespace tucker_ops::cuda {

// a·v + b, then LeakyReLU; a NaN stays one.
TUCKER_DEVICE float activated(float v, float a, float b, float slope) {
  v = fmaf(v, a, b);
  return v > 0.0f ? v : v * slope;
}

// The norm and activation of a source for the channels of one lane: a quarter of a group. kVectors: channels fill whole
// 16 bytes of elements, and so whole 16 bytes of float32.
template <class M, bool kVectors>
struct Activation {
  static constexpr int kOwn = M::kGroup / 4;
  float scale[kOwn], shift[kOwn], slope;

  TUCKER_DEVICE static bool wanted(const Source& source) { return source.scale || source.shift || source.slope != 1.0f; }

  TUCKER_DEVICE Activation(const Source& source, int n, int channel) : slope(source.slope) {
    const int64_t at = static_cast<int64_t>(n) * source.channels + channel;
    read(source.scale, at, source.channels - channel, 1.0f, scale);
    read(source.shift, at, source.channels - channel, 0.0f, shift);
  }

  // `left` channels of the item are left from there on.
  TUCKER_DEVICE static void read(const float* values, int64_t at, int left, float otherwise, float (&to)[kOwn]) {
    TUCKER_UNROLL
    for (int i = 0; i < kOwn; ++i) to[i] = otherwise;
    if (!values) return;
    if constexpr (kVectors) {
      if (left <= 0) return;
      TUCKER_UNROLL
      for (int i = 0; i < kOwn; i += 4) {
        const Words4 words = load16(values + at + i);
        TUCKER_UNROLL
        for (int j = 0; j < 4; ++j) to[i + j] = as_float(words.v[j]);
      }
    } else {
      TUCKER_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        if (i < left) to[i] = load(values + at + i);
      }
    }
  }

  TUCKER_DEVICE void apply(Words4& words) const {
    TUCKER_UNROLL
    for (int w = 0; w < 4; ++w) {
      if constexpr (M::kSize == 2) {
        words.v[w] = M::pair(activated(M::low(words.v[w]), scale[2 * w], shift[2 * w], slope),
                             activated(M::high(words.v[w]), scale[2 * w + 1], shift[2 * w + 1], slope));
      } else {
        words.v[w] = as_word(activated(as_float(words.v[w]), scale[w], shift[w], slope));
      }
    }
  }
};

// The quarter of a group at `channel` of a row, zero beyond `channels`; element by element unless rows are aligned.
template <class M>
TUCKER_DEVICE Words4 load_quarter(const void* base, int64_t row, int channel, int channels, bool vectors) {
  Words4 words = {};
  const auto* from = static_cast<const typename M::Element*>(base) + row + channel;
  if (vectors) {
    if (channel < channels) words = load16(from);
    return words;
  }
  TUCKER_UNROLL
  for (int i = 0; i < M::kChunk; ++i) {
    if (channel + i >= channels) continue;
    if constexpr (M::kSize == 2)
      words.v[i / 2] |= static_cast<uint32_t>(load(from + i)) << (i % 2 * 16);
    else
      words.v[i] = as_word(load(from + i));
  }
  return words;
}

// Both steps of a group: c += rows · column. `first` and `second` are the quarters of rows l / 4 and l / 4 + 8.
template <class M>
TUCKER_DEVICE void multiply_group(float (&c)[4], const Words4& first, const Words4& second, const Words4& column) {
  TUCKER_UNROLL
  for (int step = 0; step < 2; ++step) {
    const uint32_t a[4] = {first.v[2 * step], second.v[2 * step], first.v[2 * step + 1], second.v[2 * step + 1]};
    const uint32_t b[2] = {column.v[2 * step], column.v[2 * step + 1]};
    M::multiply(c, a, b);
  }
}

// Statistics that a warp gathers of its values in shared memory, per channel: a pivot near the mean, the sum of
// deviations from it, and of their squares. The pivot is a value of the channel itself, so that neither sum cancels.
struct WarpMoments {
  static constexpr int kBytes = 12;
  uint32_t base;  // of this warp
  bool wanted, first;

  TUCKER_DEVICE uint32_t at(int channel, int what) const { return base + (channel * 3 + what) * 4; }
};

// Merges two sets of values (Chan, Golub, LeVeque 1979).
TUCKER_DEVICE Moments merged(const Moments& a, const Moments& b) {
  if (a.count == 0.0f) return b;
  if (b.count == 0.0f) return a;
  const float count = a.count + b.count, delta = b.mean - a.mean, share = b.count / count;
  return {count, fmaf(delta, share, a.mean), a.m2 + b.m2 + delta * delta * a.count * share};
}

// The columns of a step: from `start`, per channel of this lane, on.
template <class M, int kSteps>
TUCKER_DEVICE void multiply_steps(float (&y)[M::kStepTiles][4], const float (&start)[M::kStep / 4], const uint32_t (&z)[kSteps][4],
                                  const uint32_t (&b)[M::kStepTiles][kSteps][2]) {
  TUCKER_UNROLL
  for (int tile = 0; tile < M::kStepTiles; ++tile) {
    TUCKER_UNROLL
    for (int i = 0; i < 4; ++i) y[tile][i] = start[2 * tile + i % 2];
    TUCKER_UNROLL
    for (int step = 0; step < kSteps; ++step) M::multiply(y[tile], z[step], b[tile][step]);
  }
}

// y = u_out · z + bias for kRows tiles of 16 voxels. `rows` tells where voxel l / 4 + 8r of tile t lies, l being the lane:
// pointer(t, r), an element pointer, and valid(t, r); forget() keeps the compiler from computing them all
// beforehand.
template <class M, int kRows, int kSteps, class Rows>
TUCKER_DEVICE void expand(const uint32_t (&z)[kRows][kSteps][4], const Expansion& e, Rows rows, const WarpMoments& moments) {
  using Element = typename M::Element;
  const int lane = thread_index() % 32, g = lane / 4, q = lane % 4;
  constexpr int kUnit = M::kStep, kTiles = M::kStepTiles, kOwn = kUnit / 4;
  TUCKER_NO_UNROLL
  for (int group = 0; group < e.channels; group += kUnit) {
    uint32_t b[kTiles][kSteps][2];
    TUCKER_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const int channel = group + channel_of<M>(kUnit, tile, g);
      TUCKER_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        Words2 words = {};
        if (channel < e.channels)
          words = load8(static_cast<const Element*>(e.u_out) + static_cast<int64_t>(channel) * e.pitch + step * M::kStep + M::kStep / 4 * q);
        b[tile][step][0] = words.v[0];
        b[tile][step][1] = words.v[1];
      }
    }
    // This lane's channels: a quarter of the step, two of each tile. Sums start at bias - pivot, so that they end as
    // deviations.
    const int own = group + kUnit / 4 * q;
    float start[kOwn], pivot[kOwn], sum[kOwn], square[kOwn];
    TUCKER_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      start[i] = e.bias && own + i < e.channels ? value_of<M>(load(static_cast<const Element*>(e.bias) + own + i)) : 0.0f;
      sum[i] = square[i] = pivot[i] = 0.0f;
    }
    if (moments.wanted) {
      if (moments.first) {
        float y[kTiles][4];
        multiply_steps<M>(y, start, z[0], b);
        TUCKER_UNROLL
        for (int i = 0; i < kOwn; ++i) pivot[i] = shuffle_from(y[i / 2][i % 2], q);
      } else {
        TUCKER_UNROLL
        for (int i = 0; i < kOwn; ++i) pivot[i] = as_float(shared_load4(moments.at(own + i, 0)));
      }
      TUCKER_UNROLL
      for (int i = 0; i < kOwn; ++i) start[i] -= pivot[i];
    }
    TUCKER_UNROLL
    for (int t = 0; t < kRows; ++t) {
      rows.forget();
      float y[kTiles][4];
      multiply_steps<M>(y, start, z[t], b);
      if (moments.wanted) {
        TUCKER_UNROLL
        for (int r = 0; r < 2; ++r) {
          if (!rows.valid(t, r)) continue;
          TUCKER_UNROLL
          for (int i = 0; i < kOwn; ++i) {
            const float deviation = y[i / 2][2 * r + i % 2];
            sum[i] += deviation;
            square[i] = fmaf(deviation, deviation, square[i]);
          }
        }
        TUCKER_UNROLL
        for (int i = 0; i < kOwn; ++i) {
          y[i / 2][i % 2] += pivot[i];
          y[i / 2][2 + i % 2] += pivot[i];
        }
      }
      uint32_t factor[4];
      to_factor<M>(&y[0], factor);
      TUCKER_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (own < e.channels && rows.valid(t, r))
          store8(rows.pointer(t, r) + own, Words2{{factor[r], factor[2 + r]}});
      }
    }
    if (moments.wanted) {
      TUCKER_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        TUCKER_UNROLL
        for (int mask = 4; mask < 32; mask *= 2) {
          sum[i] += shuffle_xor(sum[i], mask);
          square[i] += shuffle_xor(square[i], mask);
        }
        if (g == 0) {
          if (moments.first) {
            shared_store4(moments.at(own + i, 0), as_word(pivot[i]));
          } else {
            sum[i] += as_float(shared_load4(moments.at(own + i, 1)));
            square[i] += as_float(shared_load4(moments.at(own + i, 2)));
          }
          shared_store4(moments.at(own + i, 1), as_word(sum[i]));
          shared_store4(moments.at(own + i, 2), as_word(square[i]));
        }
      }
    }
  }
  if (moments.wanted) sync_warp();
}

}  // namespace tucker_ops::cuda
