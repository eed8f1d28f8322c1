// What a kernel asks of a multiprocessor. Compiled by nvcc it is PTX; compiled for the host, an emulated multiprocessor
// answers (emulation.h), so that tests run the very kernels without a GPU.
//
// Addresses of shared memory are 32-bit byte offsets. Collective functions (mma, load_matrices, shuffles, barriers) are
// called by all 32 lanes of a warp.
#pragma once

#include <cstdint>

#if !defined(__CUDACC__)
#include "emulation.h"
#else
#define TUCKER_DEVICE __device__ __forceinline__
#define TUCKER_BOTH __host__ __device__
#define TUCKER_UNROLL _Pragma("unroll")
#define TUCKER_NO_UNROLL _Pragma("unroll 1")

namespace tucker_ops::cuda {

struct Words2 {
  uint32_t v[2];
};
struct Words4 {
  uint32_t v[4];
};
struct Block {
  int x, y, z;
};

// The architecture that this pass of the compiler is for; kernels for later ones are left empty.
#if defined(__CUDA_ARCH__)
constexpr int kCompiledFor = __CUDA_ARCH__ / 10;
#else
constexpr int kCompiledFor = 0;
#endif

TUCKER_DEVICE void give_up() { asm volatile("trap;"); }

TUCKER_DEVICE int thread_index() { return threadIdx.x; }
TUCKER_DEVICE Block block_index() { return {static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)}; }

// A value that the compiler knows nothing of, so that what is derived from it stays where it is used: kept in registers
// over a loop, it would push sums out of them.
TUCKER_DEVICE int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Global memory that no thread of the kernel writes.
TUCKER_DEVICE Words4 load16(const void* p) {
  Words4 w;
  asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.v[3]) : "l"(p));
  return w;
}
TUCKER_DEVICE Words2 load8(const void* p) {
  Words2 w;
  asm("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(w.v[0]), "=r"(w.v[1]) : "l"(p));
  return w;
}
template <class T>
TUCKER_DEVICE T load(const T* p) {
  return __ldg(p);
}
// Without waiting for it: the line comes into L2, whence the load that follows takes a third of the time.
TUCKER_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

TUCKER_DEVICE void store16(void* p, const Words4& w) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w.v[0]), "r"(w.v[1]), "r"(w.v[2]), "r"(w.v[3]) : "memory");
}
TUCKER_DEVICE void store8(void* p, const Words2& w) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(w.v[0]), "r"(w.v[1]) : "memory");
}
template <class T>
TUCKER_DEVICE void store(T* p, T value) {
  *p = value;
}

TUCKER_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(bytes));
}
TUCKER_DEVICE void shared_store8(uint32_t at, uint32_t a, uint32_t b) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(a), "r"(b) : "memory");
}
TUCKER_DEVICE void shared_store4(uint32_t at, uint32_t a) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(a) : "memory"); }
TUCKER_DEVICE void shared_store2(uint32_t at, uint16_t a) { asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"(a) : "memory"); }
TUCKER_DEVICE uint32_t shared_load4(uint32_t at) {
  uint32_t a;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(a) : "r"(at) : "memory");
  return a;
}
TUCKER_DEVICE uint32_t shared_load2(uint32_t at) {
  uint16_t a;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(a) : "r"(at) : "memory");
  return a;
}
TUCKER_DEVICE Words2 shared_load8(uint32_t at) {
  Words2 w;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(w.v[0]), "=r"(w.v[1]) : "r"(at) : "memory");
  return w;
}

// Four 8×8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8, 16 bytes. Lane l gets of each matrix the
// 4 bytes at l % 4 of row l / 4.
TUCKER_DEVICE void load_matrices(uint32_t (&a)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(row)
               : "memory");
}

TUCKER_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
TUCKER_DEVICE float shuffle_from(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
TUCKER_DEVICE void sync_warp() { __syncwarp(); }
TUCKER_DEVICE void barrier() { __syncthreads(); }

TUCKER_DEVICE float as_float(uint32_t w) { return __uint_as_float(w); }
TUCKER_DEVICE uint32_t as_word(float v) { return __float_as_uint(v); }
// (low, high) halves, rounded to nearest even.
TUCKER_DEVICE uint32_t fp16_pair(float low, float high) {
  uint32_t w;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
#else
  asm("{.reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}" : "=r"(w) : "f"(low), "f"(high));
#endif
  return w;
}
TUCKER_DEVICE float fp16_low(uint32_t w) {
  float v;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(v) : "r"(w));
  return v;
}
TUCKER_DEVICE float fp16_high(uint32_t w) {
  float v;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(v) : "r"(w));
  return v;
}
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
TUCKER_DEVICE uint32_t bf16_pair(float low, float high) {
  uint32_t w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  return w;
}
TUCKER_DEVICE uint32_t tf32(float v) {
  uint32_t w;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(w) : "f"(v));
  return w;
}
#endif

// c += a · b. a: 16×k, row l/4 and l/4 + 8 of lane l; b: k×8, column l/4; c: rows l/4 (c0, c1) and l/4 + 8 (c2, c3),
// columns 2(l%4) and 2(l%4) + 1. k = 16 of 2 bytes, or 8 of 4.
TUCKER_DEVICE void mma_fp16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
TUCKER_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
TUCKER_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

}  // namespace tucker_ops::cuda
#endif
