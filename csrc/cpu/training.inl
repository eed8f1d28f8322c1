// The kernels of training.h in vectors of eight floats, for the instructions that this is compiled for.

#include <algorithm>
#include <cstring>

#include "training.h"

namespace tucker_ops::cpu {
namespace {

constexpr int64_t kLanes = 8;
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));

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

TUCKER_INLINE Floats choose(Ints condition, Floats yes, Floats no) {
  return reinterpret_cast<Floats>((condition & reinterpret_cast<Ints>(yes)) | (~condition & reinterpret_cast<Ints>(no)));
}
TUCKER_INLINE Floats leaky(Floats value, float slope) { return choose(value > 0.0f, value, value * slope); }

// Runs body(first channel, lanes) for each vector of channels.
template <class Body>
TUCKER_INLINE void for_vectors(int64_t channels, const Body& body) {
  for (int64_t c = 0; c < channels; c += kLanes) body(c, std::min(kLanes, channels - c));
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
        const Floats behind = choose(input * a + b > 0.0f, g, g * slope);
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
        const Floats behind = choose(input * a + b > 0.0f, g, g * slope);
        write(grad_x + v * channels + c, behind * a + (input - middle) * d + e);
      }
    });
  });
}

// MR rows of weights by NV vectors in registers, over all voxels of the row.
template <int MR, int NV>
void outer_block(const RowPair& row, int64_t rank_in, float* weights) {
  Floats total[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) total[i][j] = load(weights + i * rank_in + j * kLanes);
  const float *grad = row.grad, *t = row.t;
  for (int64_t v = 0; v < row.voxels; ++v, grad += row.grad_step, t += row.t_step) {
    Floats right[NV];
    for (int j = 0; j < NV; ++j) right[j] = load(t + j * kLanes);
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) total[i][j] += right[j] * grad[i];
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) store(weights + i * rank_in + j * kLanes, total[i][j]);
}

template <int NV>
void outer_rows(const RowPair& row, int64_t rows, int64_t rank_in, float* weights) {
  switch (rows) {
    case 6: return outer_block<6, NV>(row, rank_in, weights);
    case 5: return outer_block<5, NV>(row, rank_in, weights);
    case 4: return outer_block<4, NV>(row, rank_in, weights);
    case 3: return outer_block<3, NV>(row, rank_in, weights);
    case 2: return outer_block<2, NV>(row, rank_in, weights);
    default: return outer_block<1, NV>(row, rank_in, weights);
  }
}

void outer(const RowPair& row, int64_t rank_out, int64_t rank_in, float* weights) {
  const int64_t blocks = (rank_out + 5) / 6;
  for (int64_t j = 0; j < rank_in; j += 2 * kLanes) {
    for (int64_t block = 0, i = 0; block < blocks; ++block) {
      const int64_t rows = rank_out / blocks + (block < rank_out % blocks);
      const RowPair part{row.grad + i, row.t + j, row.voxels, row.grad_step, row.t_step};
      float* const to = weights + i * rank_in + j;
      if (j + 2 * kLanes <= rank_in) {
        outer_rows<2>(part, rows, rank_in, to);
      } else {
        outer_rows<1>(part, rows, rank_in, to);
      }
      i += rows;
    }
  }
}

}  // namespace

const TrainingKernels TUCKER_TRAINING = {
    {statistics<float>, apply<float>, sums<float>, gradient<float>},
    {statistics<uint16_t>, apply<uint16_t>, sums<uint16_t>, gradient<uint16_t>},
    outer,
};

}  // namespace tucker_ops::cpu
