// Vectors of TUCKER_LANES float32, conversions, and the multiply-accumulate that all stages share.
//
// Everything in the .inl files has internal linkage and no STL is used: an inline function compiled with
// wider instructions could otherwise be the copy that the linker keeps for the whole program.

#include <cstdint>

#if defined(__AVX512BF16__)
#include <immintrin.h>
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

// Two adjacent channels in bfloat16, the first in the low half.
struct Pair {
  uint32_t bits;
} __attribute__((aligned(2), may_alias));

// What a stage multiplies and an intermediate is stored as: channels in one unit, and units in one vector of channels.
template <class U>
constexpr int kChannels = 1;
template <>
constexpr int kChannels<Pair> = 2;
template <class U>
constexpr int kUnits = LANES / kChannels<U>;

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

TUCKER_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
TUCKER_INLINE Vec load(const bfloat16* p) {
  const Halves halves = *reinterpret_cast<const UnalignedHalves*>(p);
  return reinterpret_cast<Vec>(__builtin_convertvector(halves, Bits) << 16);
}

TUCKER_INLINE Vec load(const Pair* p) { return load(reinterpret_cast<const bfloat16*>(p)); }

// The first `count` values and zeros, or all lanes if there are as many.
template <class T>
TUCKER_INLINE Vec load_lanes(const T* p, int64_t count) {
  if (count >= LANES) return load(p);
  // A gray image: not by way of memory, which would wait for the store.
  if (count == 1) return Vec{to_float(*p)};
  float lanes[LANES] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}

TUCKER_INLINE void store(float* p, Vec value) { *reinterpret_cast<UnalignedVec*>(p) = value; }
// Rounds to nearest, ties to even; a NaN stays one.
TUCKER_INLINE void store(bfloat16* p, Vec value) {
  const Bits bits = reinterpret_cast<Bits>(value);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet = (bits >> 16) | 0x40u;
  const Bits is_nan = reinterpret_cast<Bits>(value != value);
  const Bits chosen = (is_nan & quiet) | (~is_nan & rounded);
  *reinterpret_cast<UnalignedHalves*>(p) = __builtin_convertvector(chosen, Halves);
}

TUCKER_INLINE void store(Pair* p, Vec value) { store(reinterpret_cast<bfloat16*>(p), value); }

// Stores the first `count` lanes, `stride` elements apart.
template <class T>
TUCKER_INLINE void store_lanes(T* p, Vec value, int64_t count, int64_t stride) {
  T lanes[LANES];
  store(lanes, value);
  for (int64_t i = 0; i < count; ++i) p[i * stride] = lanes[i];
}

template <class T>
TUCKER_INLINE void widen(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

#if TUCKER_LANES == 4
#define TUCKER_LOW 0, 4, 1, 5
#define TUCKER_HIGH 2, 6, 3, 7
#elif TUCKER_LANES == 8
#define TUCKER_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define TUCKER_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define TUCKER_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define TUCKER_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#endif

// Transposes LANES × LANES values: each round is a perfect shuffle of the rows.
TUCKER_INLINE void transpose(Vec (&rows)[LANES]) {
  Vec next[LANES];
  for (int span = 1; span < LANES; span *= 2) {
    for (int i = 0; i < LANES / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + LANES / 2], Bits{TUCKER_LOW});
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + LANES / 2], Bits{TUCKER_HIGH});
    }
    for (int i = 0; i < LANES; ++i) rows[i] = next[i];
  }
}

TUCKER_INLINE Vec multiply_add(Vec sum, Vec weight, float value) { return sum + weight * value; }
// A weight holds a pair for each output channel; products are exact, sums float32.
TUCKER_INLINE Vec multiply_add(Vec sum, Vec weight, Pair value) {
#if defined(__AVX512BF16__)
  const __m512i pair = _mm512_set1_epi32(static_cast<int>(value.bits));
  return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)pair);
#else
  const Bits pairs = reinterpret_cast<Bits>(weight);
  const Vec low = reinterpret_cast<Vec>(pairs << 16), high = reinterpret_cast<Vec>(pairs & 0xffff0000u);
  const bfloat16 first{static_cast<uint16_t>(value.bits)}, second{static_cast<uint16_t>(value.bits >> 16)};
  return sum + low * to_float(first) + high * to_float(second);
#endif
}

// acc[j] += sum over k < n of a[j·LDA + k·step] · w[k]; LDA = 0 takes `lda` instead, N = 0 takes `n`.
template <int MR, int NV, int LDA, int N = 0, class U>
TUCKER_INLINE void accumulate(Vec (&acc)[MR][NV], const U* a, int64_t lda, int64_t step, int64_t n, const float* w) {
  const int64_t ld = LDA ? LDA : lda;
  const int64_t count = N ? N : n;
  for (int64_t k = 0; k < count; ++k) {
    Vec weight[NV];
    for (int v = 0; v < NV; ++v) weight[v] = reinterpret_cast<const Vec*>(w)[v];
    for (int j = 0; j < MR; ++j) {
      const U value = a[j * ld];
      for (int v = 0; v < NV; ++v) acc[j][v] = multiply_add(acc[j][v], weight[v], value);
    }
    a += step;
    w += NV * LANES;
  }
}

// The same over `n` units of channels that lie in groups of LANES channels; returns the weights after those used.
template <int MR, int NV, int LDA, class U>
TUCKER_INLINE const float* accumulate_groups(Vec (&acc)[MR][NV], const U* a, int64_t lda, int64_t group_stride,
                                             int64_t n, const float* w) {
  constexpr int units = kUnits<U>;
  int64_t k = 0;
  for (; k + units <= n; k += units, a += group_stride, w += units * NV * LANES)
    accumulate<MR, NV, LDA, units>(acc, a, lda, 1, units, w);
  if (k < n) accumulate<MR, NV, LDA>(acc, a, lda, 1, n - k, w);
  return w + (n - k) * NV * LANES;
}

// Voxels in a block: their accumulators fill the registers, 12 of 16, or 24 of the 32 that AVX-512 has.
// Sanitizers take minutes to compile blocks of every size; smaller ones index the same way.
#if defined(TUCKER_VOXELS)
template <int NV>
constexpr int kVoxels = TUCKER_VOXELS;
#else
template <int NV>
constexpr int kVoxels = LANES == 16 || NV == 1 ? 12 : 6;
#endif

// Calls f(Int<MR>, start) for the sizes MR = size, trying each from Most downwards.
template <int Most, class F>
TUCKER_INLINE void call_with_size(int64_t size, int64_t start, const F& f) {
  if (size == Most) return f(Int<Most>(), start);
  if constexpr (Most > 1) call_with_size<Most - 1>(size, start, f);
}

// Calls f(Int<MR>, start) for blocks of about equal size that cover [begin, end): one much smaller than the
// rest would wait for its own sums.
template <int NV, class F>
TUCKER_INLINE void voxel_blocks(int64_t begin, int64_t end, const F& f) {
  int64_t blocks = ceil_div(end - begin, kVoxels<NV>);
  for (int64_t at = begin; blocks > 0; --blocks) {
    const int64_t size = (end - at) / blocks;
    call_with_size<kVoxels<NV>>(size, at, f);
    at += size;
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

}  // namespace
}  // namespace tucker_ops::cpu
