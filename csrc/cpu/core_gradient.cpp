// tucker_ops::_core_gradient_cpu: the gradient of a core's weights, Σ over voxels of grad · tᵀ for every tap, in fp32.
//
// Each row of t is copied once into a buffer with the padding around it, and multiplied there by every row of grad that it
// meets, the taps along the row at once, sums in registers. Rows are dealt out in shares of their own weights, whose number
// depends on the problem alone: the result does not depend on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "training.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace tucker_ops::cpu {
namespace {

constexpr const char* kOp = "tucker_ops::_core_gradient_cpu";
// Weights of all shares together, and shares.
constexpr int64_t kMostBytes = 16 * 1024 * 1024;
constexpr int64_t kMostShares = 16;
// Of a share: fewer would take less time than to add up its weights.
constexpr int64_t kFewestVoxels = 64;

using Three = std::array<int64_t, 3>;

Three three(const std::vector<int64_t>& values, int64_t fill) {
  STD_TORCH_CHECK(values.size() == 2 || values.size() == 3, kOp, ": takes 2 or 3 axes");
  Three result{fill, fill, fill};
  std::copy(values.begin(), values.end(), result.end() - values.size());
  return result;
}

// Spatial extents of a channels-last float tensor.
Three extents(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_cpu() && (x.dim() == 4 || x.dim() == 5), kOp,
                  ": computes float32 [N, R, *spatial] on the CPU");
  std::vector<int64_t> size;
  int64_t stride = x.size(1);
  bool fits = x.size(1) == 1 || x.stride(1) == 1;
  for (int64_t axis = x.dim() - 1; axis >= 2; --axis) {
    fits = fits && (x.size(axis) == 1 || x.stride(axis) == stride);
    stride *= x.size(axis);
    size.insert(size.begin(), x.size(axis));
  }
  STD_TORCH_CHECK(fits && (x.size(0) <= 1 || x.stride(0) == stride), kOp, ": tensors must be channels-last");
  return three(size, 1);
}

// The output position whose tap reads the padded position `at`, or -1.
int64_t met(int64_t at, int64_t stride, int64_t out) {
  return at < 0 || at % stride != 0 || at / stride >= out ? -1 : at / stride;
}

Tensor core_gradient(Tensor grad, Tensor t, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const Three out = extents(grad), in = extents(t);
  const Three k = three(kernel, 1), s = three(stride, 1), p = three(padding, 0), d = three(dilation, 1);
  const int64_t items = t.size(0), rank_in = t.size(1), rank_out = grad.size(1);
  bool fits = grad.dim() == t.dim() && static_cast<int64_t>(kernel.size()) == t.dim() - 2 && grad.size(0) == items;
  for (int axis = 0; axis < 3; ++axis) {
    fits = fits && k[axis] > 0 && s[axis] > 0 && d[axis] > 0 &&
           out[axis] == (in[axis] + 2 * p[axis] - d[axis] * (k[axis] - 1) - 1) / s[axis] + 1;
  }
  STD_TORCH_CHECK(fits, kOp, ": grad does not have the extents that this convolution of t has");
  const TrainingKernels& kernels = training_kernels();
  const int64_t padded = (rank_in + kernels.lanes - 1) / kernels.lanes * kernels.lanes, pitch = k[2] * padded;
  const int64_t weights = k[0] * k[1] * rank_out * pitch, rows = items * in[0] * in[1];
  const int64_t shares = std::max<int64_t>(
      1, std::min({kMostShares, kMostBytes / std::max<int64_t>(1, 4 * weights), rows, rows * out[2] / kFewestVoxels}));
  // Of the buffer: the first voxel that grad's row meets lies at 0.
  const int64_t length = out[2] > 0 ? (out[2] - 1) * s[2] + (k[2] - 1) * d[2] + 1 : 0;
  const int64_t begins = std::min(p[2], length), copied = std::min(in[2], length - begins);
  std::vector<int64_t> columns;
  for (int64_t tap = 0; tap < k[2]; ++tap)
    for (int64_t j = 0; j < padded; j += kernels.lanes) columns.push_back(tap * d[2] * padded + j);
  std::vector<float> sums(shares * weights, 0.0f);
  const auto* const g = static_cast<const float*>(grad.const_data_ptr());
  const auto* const x = static_cast<const float*>(t.const_data_ptr());
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(length * padded, 0.0f);
    for (int64_t share = begin; share < end; ++share) {
      float* const to = sums.data() + share * weights;
      for (int64_t row = share * rows / shares; row < (share + 1) * rows / shares; ++row) {
        const int64_t ih = row % in[1], id = row / in[1] % in[0], n = row / (in[0] * in[1]);
        const float* const from = x + row * in[2] * rank_in;
        for (int64_t v = 0; v < copied; ++v)
          std::memcpy(buffer.data() + (begins + v) * padded, from + v * rank_in, rank_in * sizeof(float));
        for (int64_t kd = 0; kd < k[0]; ++kd) {
          const int64_t od = met(id + p[0] - kd * d[0], s[0], out[0]);
          if (od < 0) continue;
          for (int64_t kh = 0; kh < k[1]; ++kh) {
            const int64_t oh = met(ih + p[1] - kh * d[1], s[1], out[1]);
            if (oh < 0) continue;
            kernels.products({g + ((n * out[0] + od) * out[1] + oh) * out[2] * rank_out, rank_out, 1, rank_out, buffer.data(),
                              s[2] * padded, columns.data(), static_cast<int64_t>(columns.size()), out[2],
                              to + (kd * k[1] + kh) * rank_out * pitch, pitch, true});
          }
        }
      }
    }
  });
  // [kd, kh, R_out, kw, R_in] of every share to [R_out, R_in, kd, kh, kw].
  std::vector<int64_t> size{rank_out, rank_in};
  size.insert(size.end(), kernel.begin(), kernel.end());
  Tensor result = torch::stable::new_empty(t, size);
  auto* const to = static_cast<float*>(result.mutable_data_ptr());
  for (int64_t share = 1; share < shares; ++share) {
    for (int64_t i = 0; i < weights; ++i) sums[i] += sums[share * weights + i];
  }
  for (int64_t i = 0; i < rank_out; ++i) {
    for (int64_t j = 0; j < rank_in; ++j) {
      for (int64_t plane = 0; plane < k[0] * k[1]; ++plane) {
        const float* const from = sums.data() + (plane * rank_out + i) * pitch + j;
        for (int64_t tap = 0; tap < k[2]; ++tap) to[((i * rank_in + j) * k[0] * k[1] + plane) * k[2] + tap] = from[tap * padded];
      }
    }
  }
  return result;
}

}  // namespace
}  // namespace tucker_ops::cpu

STABLE_TORCH_LIBRARY_IMPL(tucker_ops, CPU, m) { m.impl("_core_gradient_cpu", TORCH_BOX(&tucker_ops::cpu::core_gradient)); }
