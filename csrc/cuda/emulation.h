// The multiprocessor of device.cuh, emulated on the host: every thread of a block is a coroutine. Lanes of a warp meet at
// collective functions, warps at barriers; between barriers warps run one after the other in an order drawn at random.
//
// Checked while a kernel runs, with an error that ends the launch: shared memory read before it was written, touched
// outside the block's, or touched by two warps without a barrier between (one of them writing); global memory outside
// what the caller lent; misaligned accesses; lanes that do not meet.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define TUCKER_DEVICE inline
#define TUCKER_BOTH
#define TUCKER_UNROLL
#define TUCKER_NO_UNROLL

namespace tucker_ops::cuda {

struct alignas(8) Words2 {
  uint32_t v[2];
};
struct alignas(16) Words4 {
  uint32_t v[4];
};
struct Block {
  int x, y, z;
};

constexpr int kCompiledFor = 1000;  // every architecture's kernels

namespace emulation {

// Runs `kernel` for all threads of all blocks; returns what went wrong, or nothing.
std::string run(const Block& grid, int threads, int shared_bytes, const std::function<void()>& kernel);

// Memory that kernels may touch until `forget`; bytes may be 0.
void lend(const void* begin, int64_t bytes, bool writable);
void forget();

int thread();
Block block();
void check_global(const void* p, int64_t bytes, int64_t alignment, bool writing);
unsigned char* shared(uint32_t at, int bytes, bool writing);
// All lanes of the warp give `bytes` and see what each gave, [32][kMostBytes], until they meet the next time but one.
constexpr int kMostBytes = 48;
enum class Meeting { kMultiply, kMatrices, kShuffle, kWarp, kBarrier };
const unsigned char* meet(Meeting kind, const void* given, int bytes);

}  // namespace emulation

inline void give_up() {}
inline int opaque(int v) { return v; }
inline int thread_index() { return emulation::thread(); }
inline Block block_index() { return emulation::block(); }

template <class T>
inline T load(const T* p) {
  emulation::check_global(p, sizeof(T), alignof(T), false);
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}
inline Words4 load16(const void* p) { return load(static_cast<const Words4*>(p)); }
inline Words2 load8(const void* p) { return load(static_cast<const Words2*>(p)); }
inline void prefetch(const void* p) { emulation::check_global(p, 1, 1, false); }
template <class T>
inline void store(T* p, T value) {
  emulation::check_global(p, sizeof(T), alignof(T), true);
  std::memcpy(p, &value, sizeof(T));
}
inline void store16(void* p, const Words4& w) { store(static_cast<Words4*>(p), w); }

inline void store8(void* p, const Words2& w) { store(static_cast<Words2*>(p), w); }

inline uint32_t shared_base() { return 0; }
template <class T>
inline T shared_load(uint32_t at) {
  T value;
  std::memcpy(&value, emulation::shared(at, sizeof(T), false), sizeof(T));
  return value;
}
template <class T>
inline void shared_store(uint32_t at, T value) {
  std::memcpy(emulation::shared(at, sizeof(T), true), &value, sizeof(T));
}
inline void shared_store8(uint32_t at, uint32_t a, uint32_t b) { shared_store(at, Words2{{a, b}}); }
inline void shared_store4(uint32_t at, uint32_t a) { shared_store(at, a); }
inline void shared_store2(uint32_t at, uint16_t a) { shared_store(at, a); }
inline uint32_t shared_load4(uint32_t at) { return shared_load<uint32_t>(at); }
inline uint32_t shared_load2(uint32_t at) { return shared_load<uint16_t>(at); }
inline Words2 shared_load8(uint32_t at) { return shared_load<Words2>(at); }

template <class T>
inline T given_by(const unsigned char* all, int lane, int index = 0) {
  T value;
  std::memcpy(&value, all + lane * emulation::kMostBytes + index * sizeof(T), sizeof(T));
  return value;
}

inline void load_matrices(uint32_t (&a)[4], uint32_t row) {
  const Words4 own = shared_load<Words4>(row);
  const unsigned char* all = emulation::meet(emulation::Meeting::kMatrices, &own, sizeof own);
  const int lane = emulation::thread() % 32;
  for (int i = 0; i < 4; ++i) a[i] = given_by<uint32_t>(all, i * 8 + lane / 4, lane % 4);
}

inline float shuffle_from(float v, int lane) {
  return given_by<float>(emulation::meet(emulation::Meeting::kShuffle, &v, sizeof v), lane);
}
inline float shuffle_xor(float v, int mask) { return shuffle_from(v, (emulation::thread() % 32) ^ mask); }
inline void sync_warp() { emulation::meet(emulation::Meeting::kWarp, nullptr, 0); }
inline void barrier() { emulation::meet(emulation::Meeting::kBarrier, nullptr, 0); }

inline float as_float(uint32_t w) {
  float v;
  std::memcpy(&v, &w, 4);
  return v;
}
inline uint32_t as_word(float v) {
  uint32_t w;
  std::memcpy(&w, &v, 4);
  return w;
}
inline uint32_t fp16_pair(float low, float high) {
  const _Float16 halves[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t w;
  std::memcpy(&w, halves, 4);
  return w;
}
inline float fp16_low(uint32_t w) {
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (uint32_t i = 0; i < all.size(); ++i) {
      const auto bits = static_cast<uint16_t>(i);
      _Float16 half;
      std::memcpy(&half, &bits, 2);
      all[i] = static_cast<float>(half);
    }
    return all;
  }();
  return values[w & 0xffff];
}
inline float fp16_high(uint32_t w) { return fp16_low(w >> 16); }
inline uint32_t bf16_of(float v) {
  const uint32_t w = as_word(v);
  return std::isnan(v) ? 0x7fff : (w + 0x7fff + ((w >> 16) & 1)) >> 16;
}
inline uint32_t bf16_pair(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }
inline uint32_t tf32(float v) {
  const uint32_t w = as_word(v);
  return std::isfinite(v) ? (w + 0x1000) & ~0x1fffu : w;
}

// `values(word, x)` writes the numbers in a word, kPerWord of them.
template <int kPerWord, class Values>
inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Values& values) {
  float own[6 * kPerWord];
  for (int i = 0; i < 4; ++i) values(a[i], own + i * kPerWord);
  for (int i = 0; i < 2; ++i) values(b[i], own + (4 + i) * kPerWord);
  const unsigned char* all = emulation::meet(emulation::Meeting::kMultiply, own, sizeof own);
  const auto given = [all](int lane) { return reinterpret_cast<const float*>(all + lane * emulation::kMostBytes); };
  const int lane = emulation::thread() % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2, column = 2 * (lane % 4) + i % 2;
    float sum = c[i];
    for (int q = 0; q < 4; ++q) {
      const float *x = given(lane / 4 * 4 + q), *y = given(column * 4 + q);
      for (int half = 0; half < 2; ++half)
        for (int k = 0; k < kPerWord; ++k) sum += x[(2 * half + row) * kPerWord + k] * y[(4 + half) * kPerWord + k];
    }
    c[i] = sum;
  }
}
inline void mma_fp16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<2>(c, a, b, [](uint32_t w, float* x) { x[0] = fp16_low(w), x[1] = fp16_high(w); });
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<2>(c, a, b, [](uint32_t w, float* x) { x[0] = as_float(w << 16), x[1] = as_float(w & 0xffff0000u); });
}
// The unit reads 19 bits and lets the others be.
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<1>(c, a, b, [](uint32_t w, float* x) { x[0] = as_float(w & ~0x1fffu); });
}

}  // namespace tucker_ops::cuda
