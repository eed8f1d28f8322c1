// tucker_ops::_core_gradient_cpu: the gradient of a core's weights, Σ over voxels of grad · tᵀ for every tap, in fp32.
//
// A row of output voxels is multiplied by the row of t that a tap reads, sums in registers. Rows are dealt out in shares of
// their own weights, whose number depends on the problem alone: the result does not depend on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
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
  STD_TORCH_CHECK(rank_in % 8 == 0, kOp, ": takes ranks_in in multiples of 8, got ", rank_in);

  const int64_t taps = k[0] * k[1] * k[2], weights = taps * rank_out * rank_in;
  const int64_t rows = items * out[0] * out[1];
  const int64_t shares =
      std::max<int64_t>(1, std::min({kMostShares, kMostBytes / std::max<int64_t>(1, 4 * weights), rows}));
  std::vector<float> sums(shares * weights, 0.0f);
  const auto* const g = static_cast<const float*>(grad.const_data_ptr());
  const auto* const x = static_cast<const float*>(t.const_data_ptr());
  const TrainingKernels& kernels = training_kernels();
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      float* const to = sums.data() + share * weights;
      for (int64_t row = share * rows / shares; row < (share + 1) * rows / shares; ++row) {
        const int64_t oh = row % out[1], od = row / out[1] % out[0], n = row / (out[0] * out[1]);
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t kw = tap % k[2], kh = tap / k[2] % k[1], kd = tap / (k[1] * k[2]);
          const int64_t id = od * s[0] - p[0] + kd * d[0], ih = oh * s[1] - p[1] + kh * d[1];
          if (id < 0 || id >= in[0] || ih < 0 || ih >= in[1]) continue;
          // Output voxels whose input lies inside: 0 <= ow · stride + offset < width.
          const int64_t offset = kw * d[2] - p[2];
          const int64_t first = offset >= 0 ? 0 : (-offset + s[2] - 1) / s[2];
          const int64_t room = in[2] - offset;
          const int64_t last = room <= 0 ? 0 : std::min(out[2], (room - 1) / s[2] + 1);
          if (first >= last) continue;
          const RowPair pair{g + (row * out[2] + first) * rank_out,
                             x + (((n * in[0] + id) * in[1] + ih) * in[2] + first * s[2] + offset) * rank_in,
                             last - first, rank_out, s[2] * rank_in};
          kernels.outer(pair, rank_out, rank_in, to + tap * rank_out * rank_in);
        }
      }
    }
  });
  // [taps, R_out, R_in] of every share to [R_out, R_in, taps].
  std::vector<int64_t> size{rank_out, rank_in};
  size.insert(size.end(), kernel.begin(), kernel.end());
  Tensor result = torch::stable::new_empty(t, size);
  auto* const to = static_cast<float*>(result.mutable_data_ptr());
  for (int64_t share = 1; share < shares; ++share) {
    for (int64_t i = 0; i < weights; ++i) sums[i] += sums[share * weights + i];
  }
  for (int64_t i = 0; i < rank_out * rank_in; ++i) {
    for (int64_t tap = 0; tap < taps; ++tap) to[i * taps + tap] = sums[tap * rank_out * rank_in + i];
  }
  return result;
}

}  // namespace
}  // namespace tucker_ops::cpu

STABLE_TORCH_LIBRARY_IMPL(tucker_ops, CPU, m) { m.impl("_core_gradient_cpu", TORCH_BOX(&tucker_ops::cpu::core_gradient)); }
