// The kernels of training.h, in the vectors of the instructions that this is compiled for.

#include <algorithm>
#include <cstring>

#include "training.h"

namespace tucker_ops::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

#define TUCKER_INLINE static inline __attribute__((always_inline))

TUCKER_INLINE Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
TUCKER_INLINE Floats load(const uint16_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}
TUCKER_INLINE void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }
// Rounds to nearest, ties to even; a NaN stays one.
TUCKER_INLINE void store(uint16_t* to, Floats value) {
  const Words bits = reinterpret_cast<Words>(value);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = reinterpret_cast<Words>(value != value);
  const Halves halves = __builtin_convertvector((nan & ((bits >> 16) | 0x40u)) | (~nan & rounded), Halves);
  std::memcpy(to, &halves, sizeof(halves));
}

// Fewer lanes than a vector has, the rest zero.
template <class T>
TUCKER_INLINE Floats load_some(const T* from, int64_t lanes) {
  T some[kLanes] = {};
  std::memcpy(some, from, lanes * sizeof(T));
  return load(some);
}
template <class T>
TUCKER_INLINE void store_some(T* to, Floats value, int64_t lanes) {
  T some[kLanes];
  store(some, value);
  std::memcpy(to, some, lanes * sizeof(T));
}

TUCKER_INLINE Floats leaky(Floats value, float slope) { return value > 0.0f ? value : value * slope; }

// Runs body(first channel, lanes) for each vector of channels.
template <class Body>
TUCKER_INLINE void for_vectors(int64_t channels, const Body& body) {
  for (int64_t c = 0; c < channels; c += kLanes) body(c, std::min<int64_t>(kLanes, channels - c));
}

// `read(from)` loads a vector of this many lanes: whole ones at full speed.
template <class Body>
TUCKER_INLINE void with_lanes(int64_t lanes, const Body& body) {
  if (lanes == kLanes) {
    body([](const auto* from) { return load(from); }, [](auto* to, Floats value) { store(to, value); });
  } else {
    body([lanes](const auto* from) { return load_some(from, lanes); },
         [lanes](auto* to, Floats value) { store_some(to, value, lanes); });
  }
}

template <class T>
void statistics(const T* x, int64_t channels, int64_t voxels, float* mean, float* m2) {
  const float share = 1.0f / static_cast<float>(voxels);
  for_vectors(channels, [&](int64_t c, int64_t lanes) {
    with_lanes(lanes, [&](auto read, auto write) {
      Floats even = {}, odd = {};
      int64_t v = 0;
      for (; v + 1 < voxels; v += 2) {
        even += read(x + v * channels + c);
        odd += read(x + (v + 1) * channels + c);
      }
      if (v < voxels) even += read(x + v * channels + c);
      const Floats middle = (even + odd) * share;
      even = odd = Floats{};
      for (v = 0; v + 1 < voxels; v += 2) {
        const Floats a = read(x + v * channels + c) - middle, b = read(x + (v + 1) * channels + c) - middle;
        even += a * a;
        odd += b * b;
      }
      if (v < voxels) {
        const Floats a = read(x + v * channels + c) - middle;
        even += a * a;
      }
      write(mean + c, middle);
      write(m2 + c, even + odd);
    });
  });
}

template <class T>
void apply(const T* x, int64_t channels, int64_t voxels, const float* scale, const float* shift, float slope, T* y) {
  for_vectors(channels, [&](int64_t c, int64_t lanes) {
    with_lanes(lanes, [&](auto read, auto write) {
      const Floats a = read(scale + c), b = read(shift + c);
      for (int64_t v = 0; v < voxels; ++v) write(y + v * channels + c, leaky(read(x + v * channels + c) * a + b, slope));
    });
  });
}

template <class T>
void sums(const T* grad, const T* x, int64_t channels, int64_t voxels, const float* scale, const float* shift,
          const float* mean, float slope, float* sum, float* product) {
  for_vectors(channels, [&](int64_t c, int64_t lanes) {
    with_lanes(lanes, [&](auto read, auto write) {
      const Floats a = read(scale + c), b = read(shift + c), middle = read(mean + c);
      Floats total = {}, projected = {};
      for (int64_t v = 0; v < voxels; ++v) {
        const Floats input = read(x + v * channels + c), g = read(grad + v * channels + c);
        const Floats behind = input * a + b > 0.0f ? g : g * slope;
        total += behind;
        projected += behind * (input - middle);
      }
      write(sum + c, total);
      write(product + c, projected);
    });
  });
}

template <class T>
void gradient(const T* grad, const T* x, int64_t channels, int64_t voxels, const float* scale, const float* shift,
              const float* mean, const float* along, const float* constant, float slope, T* grad_x) {
  for_vectors(channels, [&](int64_t c, int64_t lanes) {
    with_lanes(lanes, [&](auto read, auto write) {
      const Floats a = read(scale + c), b = read(shift + c), middle = read(mean + c);
      const Floats d = read(along + c), e = read(constant + c);
      for (int64_t v = 0; v < voxels; ++v) {
        const Floats input = read(x + v * channels + c), g = read(grad + v * channels + c);
        const Floats behind = input * a + b > 0.0f ? g : g * slope;
        write(grad_x + v * channels + c, behind * a + (input - middle) * d + e);
      }
    });
  });
}

// MR rows of NV vectors of sums in registers. kAdjacent: left_row is 1.
template <int MR, int NV, bool kAdjacent>
void product_block(const Products& p, int64_t row, int64_t vector) {
  const int64_t left_row = kAdjacent ? 1 : p.left_row;
  float* const sums = p.sums + row * p.pitch + vector * kLanes;
  const float *left = p.left + row * left_row, *right[NV];
  for (int j = 0; j < NV; ++j) right[j] = p.right + p.columns[vector + j];
  // Rows far apart are voxels on their way through, and so are the columns of sums over voxels, unless those are added to
  // sums that are there: then they come from a buffer.
  const bool ahead_in_k = kAdjacent && row == 0 && !p.add;
  if (!kAdjacent && vector == 0) {
    const float* const ahead = left + 2 * MR * left_row;
    for (int64_t line = 0; line < MR * left_row; line += 16) __builtin_prefetch(ahead + line);
  }
  // Unrolled early, or the compiler keeps the sums in memory.
  Floats total[MR][NV] = {};
  for (int64_t k = 0; k < p.depth; ++k, left += p.left_k) {
    Floats values[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) {
      values[j] = load(right[j] + k * p.right_k);
      if (ahead_in_k) __builtin_prefetch(right[j] + (k + 24) * p.right_k);
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) total[i][j] += values[j] * left[i * left_row];
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) {
      float* const to = sums + i * p.pitch + j * kLanes;
      store(to, p.add ? load(to) + total[i][j] : total[i][j]);
    }
}

template <int MR, int NV>
void product_rows(const Products& p, int64_t rows, int64_t row, int64_t vector) {
  if constexpr (MR > 1) {
    if (rows < MR) return product_rows<MR - 1, NV>(p, rows, row, vector);
  }
  return p.left_row == 1 ? product_block<MR, NV, true>(p, row, vector) : product_block<MR, NV, false>(p, row, vector);
}

template <int NV>
void product_vectors(const Products& p, int64_t vector) {
  // Sums, a vector of each column, and one register for the broadcast; more than eight rows far apart take too many pointers.
  constexpr int kRows = std::min((kRegisters - NV - 1) / NV, 16);
  const int64_t most = p.left_row == 1 ? kRows : std::min(kRows, 8);
  const int64_t blocks = (p.rows + most - 1) / most;
  for (int64_t block = 0, row = 0; block < blocks; ++block) {
    const int64_t rows = p.rows / blocks + (block < p.rows % blocks);
    product_rows<kRows, NV>(p, rows, row, vector);
    row += rows;
  }
}

void products(const Products& p) {
  const int64_t groups = (p.vectors + 2) / 3;
  for (int64_t group = 0, vector = 0; group < groups; ++group) {
    const int64_t vectors = p.vectors / groups + (group < p.vectors % groups);
    switch (vectors) {
      case 3: product_vectors<3>(p, vector); break;
      case 2: product_vectors<2>(p, vector); break;
      default: product_vectors<1>(p, vector);
    }
    vector += vectors;
  }
}

void add_rows(const float* x, int64_t pitch, int64_t channels, int64_t rows, float* sums) {
  for_vectors(channels, [&](int64_t c, int64_t lanes) {
    with_lanes(lanes, [&](auto read, auto write) {
      Floats even = {}, odd = {};
      int64_t row = 0;
      for (; row + 1 < rows; row += 2) {
        even += read(x + row * pitch + c);
        odd += read(x + (row + 1) * pitch + c);
      }
      if (row < rows) even += read(x + row * pitch + c);
      write(sums + c, read(sums + c) + (even + odd));
    });
  });
}

void widen(const uint16_t* from, int64_t count, float* to) {
  for_vectors(count, [&](int64_t i, int64_t lanes) {
    with_lanes(lanes, [&](auto read, auto write) { write(to + i, read(from + i)); });
  });
}

void narrow(const float* from, int64_t count, uint16_t* to) {
  for_vectors(count, [&](int64_t i, int64_t lanes) {
    with_lanes(lanes, [&](auto read, auto write) { write(to + i, read(from + i)); });
  });
}

}  // namespace

const TrainingKernels TUCKER_TRAINING = {
    kLanes,
    {statistics<float>, apply<float>, sums<float>, gradient<float>},
    {statistics<uint16_t>, apply<uint16_t>, sums<uint16_t>, gradient<uint16_t>},
    products,
    add_rows,
    widen,
    narrow,
};

}  // namespace tucker_ops::cpu
