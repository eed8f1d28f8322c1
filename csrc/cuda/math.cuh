// The kinds of numbers that kernels multiply, and how their fragments lie in the lanes of a warp.
//
// Channels are counted in steps of 32 bytes (one mma along k) and groups of 64. Lane l, with q = l % 4, owns a quarter of
// each, contiguously: 8 bytes of a step, 16 of a group. mma wants other channels in lane q than these, but the order of k
// is ours as long as both factors keep it, and columns of a product may stand for channels in any order. So a row of
// either factor is read from memory as it lies, 16 bytes a lane, and a product is stored so; a product of one mma is
// the factor of the next without a shuffle:
//
//     words of a step in lane q     w[0], w[1] = its 8 bytes    a of two rows r, s = {r.w[0], s.w[0], r.w[1], s.w[1]}
//     column 2q + e of tile j       channel quarter · q + 2j + e, quarter = a fourth of the step's or group's channels
#pragma once

#include "device.cuh"

namespace tucker_ops::cuda {

template <int kBytes>
struct Widths {
  static constexpr int kSize = kBytes;
  static constexpr int kStep = 32 / kBytes;        // channels of a step: k of one mma
  static constexpr int kGroup = 64 / kBytes;       // channels of a group
  static constexpr int kChunk = 16 / kBytes;       // channels in 16 bytes
  static constexpr int kStepTiles = kStep / 8;     // mma tiles of 8 columns that make a step
  static constexpr int kGroupTiles = kGroup / 8;
  static constexpr bool kSplits = false;           // factors in two, which takes registers
};

struct Fp16 : Widths<2> {
  using Element = uint16_t;
  static constexpr int kLeastCapability = 75;
  static TUCKER_DEVICE uint32_t pair(float a, float b) { return fp16_pair(a, b); }
  static TUCKER_DEVICE float low(uint32_t w) { return fp16_low(w); }
  static TUCKER_DEVICE float high(uint32_t w) { return fp16_high(w); }
  static TUCKER_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_fp16(c, a, b); }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
struct Bf16 : Widths<2> {
  using Element = uint16_t;
  static constexpr int kLeastCapability = 80;
  static TUCKER_DEVICE uint32_t pair(float a, float b) { return bf16_pair(a, b); }
  static TUCKER_DEVICE float low(uint32_t w) { return as_float(w << 16); }
  static TUCKER_DEVICE float high(uint32_t w) { return as_float(w & 0xffff0000u); }
  static TUCKER_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(c, a, b); }
};

// float32 in memory, 10 bits of fraction in the products.
struct Tf32 : Widths<4> {
  using Element = float;
  static constexpr int kLeastCapability = 80;
  static TUCKER_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t x[4] = {tf32(as_float(a[0])), tf32(as_float(a[1])), tf32(as_float(a[2])), tf32(as_float(a[3]))};
    const uint32_t y[2] = {tf32(as_float(b[0])), tf32(as_float(b[1]))};
    mma_tf32(c, x, y);
  }
};

// float32 to its own accuracy: factors are split into two TF32 numbers, and the product of the two small ones, under
// 2^-22 of the result, is left out. Each step is added up by itself, because the units truncate sums, and always the same
// way (Ootomo, Yokota 2022, arXiv 2203.03341).
struct Fp32 : Widths<4> {
  using Element = float;
  static constexpr bool kSplits = true;
  static constexpr int kLeastCapability = 80;
  static TUCKER_DEVICE void split(uint32_t w, uint32_t& large, uint32_t& small) {
    large = tf32(as_float(w));
    small = tf32(as_float(w) - as_float(large));
  }
  static TUCKER_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t al[4], as[4], bl[2], bs[2];
    TUCKER_UNROLL
    for (int i = 0; i < 4; ++i) split(a[i], al[i], as[i]);
    TUCKER_UNROLL
    for (int i = 0; i < 2; ++i) split(b[i], bl[i], bs[i]);
    float step[4] = {};
    mma_tf32(step, as, bl);
    mma_tf32(step, al, bs);
    mma_tf32(step, al, bl);
    TUCKER_UNROLL
    for (int i = 0; i < 4; ++i) c[i] += step[i];
  }
};
#endif

// The value of an element as it lies in memory.
template <class M>
TUCKER_DEVICE float value_of(typename M::Element element) {
  if constexpr (M::kSize == 2)
    return M::low(element);
  else
    return element;
}
template <class M>
TUCKER_DEVICE typename M::Element element_of(float value) {
  if constexpr (M::kSize == 2)
    return static_cast<uint16_t>(M::pair(value, 0.0f));
  else
    return value;
}

// The product's tiles of one step, of kStepTiles tiles, as the other factor of the next product.
template <class M>
TUCKER_DEVICE void to_factor(const float (*tiles)[4], uint32_t (&a)[4]) {
  if constexpr (M::kSize == 2) {
    a[0] = M::pair(tiles[0][0], tiles[0][1]);
    a[1] = M::pair(tiles[0][2], tiles[0][3]);
    a[2] = M::pair(tiles[1][0], tiles[1][1]);
    a[3] = M::pair(tiles[1][2], tiles[1][3]);
  } else {
    a[0] = as_word(tiles[0][0]);
    a[1] = as_word(tiles[0][2]);
    a[2] = as_word(tiles[0][1]);
    a[3] = as_word(tiles[0][3]);
  }
}

// The channel, counted from the start of its unit (a step or a group), that column `column` of tile `tile` stands for.
template <class M>
TUCKER_DEVICE constexpr int channel_of(int unit, int tile, int column) {
  return unit / 4 * (column >> 1) + 2 * tile + (column & 1);
}

}  // namespace tucker_ops::cuda
