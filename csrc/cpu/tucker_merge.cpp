// tucker_ops::_tucker_merge_cpu: the sum of several tensors, each with its norm and activation still to be applied.
//
// Memory decides how fast this is, so one version for every processor will do.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "execute.h"
#include "pool.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace tucker_ops::cpu {
namespace {

constexpr const char* kOp = "tucker_ops::_tucker_merge_cpu";
constexpr int64_t kMinValuesPerThread = 64 * 1024;

struct Part {
  const void* values;
  const float *scale, *shift;  // [batch][channels] or null
  float slope;
};

float widened(float value) { return value; }
float widened(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

void put(float* to, float value) { *to = value; }
// Rounds to nearest, ties to even; a NaN stays one.
void put(uint16_t* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *to = static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40u : rounded);
}

float leaky(float value, float slope) { return value > 0 ? value : value * slope; }

// Voxels [begin, end) of batch × space, channels last.
template <class T>
void merge(const std::vector<Part>& parts, T* out, int64_t channels, int64_t space, float slope, int64_t begin, int64_t end) {
  const std::vector<float> ones(channels, 1.0f), zeros(channels, 0.0f);
  std::vector<float> sum(channels);
  for (int64_t voxel = begin; voxel < end; ++voxel) {
    const int64_t n = voxel / space;
    for (size_t i = 0; i < parts.size(); ++i) {
      const Part& part = parts[i];
      const T* const x = static_cast<const T*>(part.values) + voxel * channels;
      const float* const scale = part.scale ? part.scale + n * channels : ones.data();
      const float* const shift = part.shift ? part.shift + n * channels : zeros.data();
      float* const to = sum.data();
      const float negative = part.slope;
      if (i == 0) {
        for (int64_t c = 0; c < channels; ++c) to[c] = leaky(widened(x[c]) * scale[c] + shift[c], negative);
      } else {
        for (int64_t c = 0; c < channels; ++c) to[c] += leaky(widened(x[c]) * scale[c] + shift[c], negative);
      }
    }
    T* const y = out + voxel * channels;
    for (int64_t c = 0; c < channels; ++c) put(y + c, leaky(sum[c], slope));
  }
}

Tensor tucker_merge(std::vector<Tensor> values, std::vector<std::optional<Tensor>> scale,
                    std::vector<std::optional<Tensor>> shift, std::vector<double> slope, double out_slope) {
  STD_TORCH_CHECK(!values.empty() && scale.size() == values.size() && shift.size() == values.size() &&
                      slope.size() == values.size(),
                  kOp, ": takes one or more tensors and as many of what belongs to them");
  const Tensor& first = values[0];
  const ScalarType dtype = first.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && (first.dim() == 4 || first.dim() == 5), kOp,
                  ": computes float32 and bfloat16 [N, C, *spatial] in 2D and 3D");
  std::vector<int64_t> size;
  for (int64_t axis = 0; axis < first.dim(); ++axis) size.push_back(first.size(axis));
  const int64_t channels = size[1];
  std::vector<Part> parts;
  for (size_t i = 0; i < values.size(); ++i) {
    const Tensor& tensor = values[i];
    bool fits = tensor.dim() == first.dim() && tensor.scalar_type() == dtype && tensor.is_cpu();
    int64_t stride = channels;
    for (int64_t axis = first.dim() - 1; fits && axis >= 2; --axis) {
      fits = tensor.size(axis) == size[axis] && (size[axis] == 1 || tensor.stride(axis) == stride);
      stride *= size[axis];
    }
    fits = fits && tensor.size(0) == size[0] && tensor.size(1) == channels && (channels == 1 || tensor.stride(1) == 1) &&
           (size[0] <= 1 || tensor.stride(0) == stride);
    STD_TORCH_CHECK(fits, kOp, ": tensors must be channels-last, of one shape and dtype, on the CPU");
    auto pending = [&](const std::optional<Tensor>& given) -> const float* {
      if (!given) return nullptr;
      STD_TORCH_CHECK(given->scalar_type() == ScalarType::Float && given->is_cpu() && given->is_contiguous() &&
                          given->dim() == 2 && given->size(0) == size[0] && given->size(1) == channels,
                      kOp, ": scale and shift must be contiguous float32 [N, C]");
      return static_cast<const float*>(given->const_data_ptr());
    };
    parts.push_back({tensor.const_data_ptr(), pending(scale[i]), pending(shift[i]), static_cast<float>(slope[i])});
  }
  Tensor output = pooled_empty(size, dtype, true);
  if (output.numel() == 0) return output;
  const int64_t space = output.numel() / size[0] / channels;
  void* const out = output.mutable_data_ptr();
  const int64_t grain = std::max<int64_t>(1, kMinValuesPerThread / channels);
  torch::stable::parallel_for(0, size[0] * space, grain, [&](int64_t begin, int64_t end) {
    const float negative = static_cast<float>(out_slope);
    if (dtype == ScalarType::Float) {
      merge(parts, static_cast<float*>(out), channels, space, negative, begin, end);
    } else {
      merge(parts, static_cast<uint16_t*>(out), channels, space, negative, begin, end);
    }
  });
  return output;
}

}  // namespace
}  // namespace tucker_ops::cpu

STABLE_TORCH_LIBRARY_IMPL(tucker_ops, CPU, m) {
  m.impl("_tucker_merge_cpu", TORCH_BOX(&tucker_ops::cpu::tucker_merge));
}
