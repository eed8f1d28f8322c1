// tucker_ops::_norm_act_cpu, _norm_act_again_cpu and _norm_act_backward_cpu: InstanceNorm and LeakyReLU of channels-last
// tensors, for training.
//
// Forward reads the input twice and writes once, the gradient reads input and gradient twice and writes once.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "pool.h"
#include "training.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace tucker_ops::cpu {
namespace {

// Voxels whose sums are taken in fp32 before they are added up in double: a few channels of them stay in the first cache.
constexpr int64_t kBlock = 256;

struct Shape {
  int64_t items, channels, voxels;
  int64_t blocks() const { return (voxels + kBlock - 1) / kBlock; }
};

Shape shape_of(const char* op, const Tensor& x) {
  STD_TORCH_CHECK((x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16) && x.is_cpu() &&
                      (x.dim() == 4 || x.dim() == 5),
                  op, ": computes float32 and bfloat16 [N, C, *spatial] on the CPU");
  Shape shape{x.size(0), x.size(1), 1};
  int64_t stride = shape.channels;
  bool fits = shape.channels == 1 || x.stride(1) == 1;
  for (int64_t axis = x.dim() - 1; axis >= 2; --axis) {
    fits = fits && (x.size(axis) == 1 || x.stride(axis) == stride);
    stride *= x.size(axis);
    shape.voxels *= x.size(axis);
  }
  fits = fits && (shape.items <= 1 || x.stride(0) == stride);
  STD_TORCH_CHECK(fits, op, ": tensors must be channels-last");
  return shape;
}

const float* vector_of(const char* op, const std::optional<Tensor>& given, int64_t numel) {
  if (!given) return nullptr;
  STD_TORCH_CHECK(given->scalar_type() == ScalarType::Float && given->is_cpu() && given->is_contiguous() &&
                      given->numel() == numel,
                  op, ": weight, bias, mean and rstd must be contiguous float32, one for each channel or item and channel");
  return static_cast<const float*>(given->const_data_ptr());
}

// What a voxel's activated value comes from: x · scale + shift, per item and channel.
struct Affine {
  std::vector<float> scale, shift;
};

Affine affine_of(const Shape& s, const float* mean, const float* rstd, const float* weight, const float* bias) {
  Affine a{std::vector<float>(s.items * s.channels), std::vector<float>(s.items * s.channels)};
  for (int64_t i = 0; i < s.items * s.channels; ++i) {
    const int64_t c = i % s.channels;
    a.scale[i] = weight ? rstd[i] * weight[c] : rstd[i];
    a.shift[i] = (bias ? bias[c] : 0.0f) - mean[i] * a.scale[i];
  }
  return a;
}

// Runs body(item, first voxel, last voxel, block) for blocks of voxels of all items, on torch's threads.
template <class Body>
void for_blocks(const Shape& s, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, 64 * 1024 / (kBlock * s.channels));
  torch::stable::parallel_for(0, s.items * s.blocks(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t item = i / s.blocks(), first = i % s.blocks() * kBlock;
      body(item, first, std::min(first + kBlock, s.voxels), i);
    }
  });
}

// Chan, Golub and LeVeque's update, block after block in double: the same for every number of threads.
void combine(const Shape& s, const float* means, const float* squares, double eps, float* mean, float* rstd) {
  std::vector<double> whole(s.channels), sum(s.channels);
  for (int64_t n = 0; n < s.items; ++n) {
    std::fill(whole.begin(), whole.end(), 0.0);
    std::fill(sum.begin(), sum.end(), 0.0);
    int64_t seen = 0;
    for (int64_t b = 0; b < s.blocks(); ++b) {
      const int64_t count = std::min(kBlock, s.voxels - b * kBlock);
      const float* const m = means + (n * s.blocks() + b) * s.channels;
      const float* const q = squares + (n * s.blocks() + b) * s.channels;
      const double share = static_cast<double>(count) / static_cast<double>(seen + count);
      for (int64_t c = 0; c < s.channels; ++c) {
        const double apart = m[c] - whole[c];
        sum[c] += q[c] + apart * apart * static_cast<double>(seen) * share;
        whole[c] += apart * share;
      }
      seen += count;
    }
    for (int64_t c = 0; c < s.channels; ++c) {
      mean[n * s.channels + c] = static_cast<float>(whole[c]);
      rstd[n * s.channels + c] = static_cast<float>(1.0 / std::sqrt(sum[c] / static_cast<double>(s.voxels) + eps));
    }
  }
}

template <class T>
void activate(const Shape& s, const NormKernels<T>& kernels, const T* x, const Affine& affine, float slope, T* y) {
  for_blocks(s, [&](int64_t n, int64_t first, int64_t last, int64_t) {
    const int64_t nc = n * s.channels, at = (n * s.voxels + first) * s.channels;
    kernels.apply(x + at, s.channels, last - first, affine.scale.data() + nc, affine.shift.data() + nc, slope, y + at);
  });
}

template <class T>
void forward(const Shape& s, const NormKernels<T>& kernels, const T* x, const float* weight, const float* bias, double eps,
             float slope, T* y, float* mean, float* rstd) {
  std::vector<float> means(s.items * s.blocks() * s.channels), squares(means.size());
  for_blocks(s, [&](int64_t n, int64_t first, int64_t last, int64_t block) {
    kernels.statistics(x + (n * s.voxels + first) * s.channels, s.channels, last - first, means.data() + block * s.channels,
                       squares.data() + block * s.channels);
  });
  combine(s, means.data(), squares.data(), eps, mean, rstd);
  activate(s, kernels, x, affine_of(s, mean, rstd, weight, bias), slope, y);
}

// With g' the gradient behind the activation and x̂ the normalised input, both per item: Σ g' and Σ g' x̂, and from them
// the input's gradient scale · (g' - Σ g' / V - x̂ Σ g' x̂ / V).
template <class T>
void backward(const Shape& s, const NormKernels<T>& kernels, const T* grad, const T* x, const float* mean,
              const float* rstd, const float* weight, const float* bias, float slope, T* grad_x, float* grad_weight, float* grad_bias) {
  const Affine affine = affine_of(s, mean, rstd, weight, bias);
  std::vector<float> sums(s.items * s.blocks() * s.channels), products(sums.size());
  for_blocks(s, [&](int64_t n, int64_t first, int64_t last, int64_t block) {
    const int64_t nc = n * s.channels, at = (n * s.voxels + first) * s.channels;
    kernels.sums(grad + at, x + at, s.channels, last - first, affine.scale.data() + nc, affine.shift.data() + nc, mean + nc,
                 slope, sums.data() + block * s.channels, products.data() + block * s.channels);
  });
  std::vector<double> total(s.items * s.channels), projected(total.size());
  for (int64_t i = 0; i < s.items * s.blocks(); ++i) {
    const int64_t nc = i / s.blocks() * s.channels;
    for (int64_t c = 0; c < s.channels; ++c) {
      total[nc + c] += sums[i * s.channels + c];
      projected[nc + c] += products[i * s.channels + c];
    }
  }
  for (int64_t c = 0; c < s.channels; ++c) {
    double of_weight = 0, of_bias = 0;
    for (int64_t n = 0; n < s.items; ++n) {
      of_weight += projected[n * s.channels + c] * rstd[n * s.channels + c];
      of_bias += total[n * s.channels + c];
    }
    grad_weight[c] = static_cast<float>(of_weight);
    grad_bias[c] = static_cast<float>(of_bias);
  }
  if (grad_x == nullptr) return;
  std::vector<float> along(total.size()), constant(total.size());
  for (size_t i = 0; i < total.size(); ++i) {
    const double r = rstd[i], voxels = static_cast<double>(s.voxels);
    along[i] = static_cast<float>(-affine.scale[i] * r * r * projected[i] / voxels);
    constant[i] = static_cast<float>(-affine.scale[i] * total[i] / voxels);
  }
  for_blocks(s, [&](int64_t n, int64_t first, int64_t last, int64_t) {
    const int64_t nc = n * s.channels, at = (n * s.voxels + first) * s.channels;
    kernels.gradient(grad + at, x + at, s.channels, last - first, affine.scale.data() + nc, affine.shift.data() + nc,
                     mean + nc, along.data() + nc, constant.data() + nc, slope, grad_x + at);
  });
}

std::vector<int64_t> size_of(const Tensor& x) {
  std::vector<int64_t> size;
  for (int64_t axis = 0; axis < x.dim(); ++axis) size.push_back(x.size(axis));
  return size;
}

Tensor floats(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}

float* data(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> norm_act(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                                            double slope) {
  constexpr const char* op = "tucker_ops::_norm_act_cpu";
  const Shape s = shape_of(op, x);
  const float* const w = vector_of(op, weight, s.channels);
  const float* const b = vector_of(op, bias, s.channels);
  Tensor y = pooled_empty(size_of(x), x.scalar_type(), true);
  Tensor mean = floats(x, {s.items, s.channels}), rstd = floats(x, {s.items, s.channels});
  if (x.numel() == 0) return {y, mean, rstd};
  const float negative = static_cast<float>(slope);
  if (x.scalar_type() == ScalarType::Float) {
    forward(s, training_kernels().float32, static_cast<const float*>(x.const_data_ptr()), w, b, eps, negative,
            static_cast<float*>(y.mutable_data_ptr()), data(mean), data(rstd));
  } else {
    forward(s, training_kernels().bfloat16, static_cast<const uint16_t*>(x.const_data_ptr()), w, b, eps, negative,
            static_cast<uint16_t*>(y.mutable_data_ptr()), data(mean), data(rstd));
  }
  return {y, mean, rstd};
}

// The values once more, from the statistics that came with them.
Tensor norm_act_again(Tensor x, Tensor mean, Tensor rstd, std::optional<Tensor> weight, std::optional<Tensor> bias,
                      double slope) {
  constexpr const char* op = "tucker_ops::_norm_act_again_cpu";
  const Shape s = shape_of(op, x);
  const float* const m = vector_of(op, mean, s.items * s.channels);
  const float* const r = vector_of(op, rstd, s.items * s.channels);
  const Affine affine = affine_of(s, m, r, vector_of(op, weight, s.channels), vector_of(op, bias, s.channels));
  Tensor y = pooled_empty(size_of(x), x.scalar_type(), true);
  if (x.numel() == 0) return y;
  const float negative = static_cast<float>(slope);
  if (x.scalar_type() == ScalarType::Float) {
    activate(s, training_kernels().float32, static_cast<const float*>(x.const_data_ptr()), affine, negative,
             static_cast<float*>(y.mutable_data_ptr()));
  } else {
    activate(s, training_kernels().bfloat16, static_cast<const uint16_t*>(x.const_data_ptr()), affine, negative,
             static_cast<uint16_t*>(y.mutable_data_ptr()));
  }
  return y;
}

// grad_x is empty, [0], where need_input says no.
std::tuple<Tensor, Tensor, Tensor> norm_act_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd,
                                                     std::optional<Tensor> weight, std::optional<Tensor> bias, double slope,
                                                     bool need_input) {
  constexpr const char* op = "tucker_ops::_norm_act_backward_cpu";
  const Shape s = shape_of(op, x), other = shape_of(op, grad);
  STD_TORCH_CHECK(other.items == s.items && other.channels == s.channels && other.voxels == s.voxels &&
                      grad.scalar_type() == x.scalar_type(),
                  op, ": grad must be of the input's shape and dtype");
  const float* const m = vector_of(op, mean, s.items * s.channels);
  const float* const r = vector_of(op, rstd, s.items * s.channels);
  const float* const w = vector_of(op, weight, s.channels);
  const float* const b = vector_of(op, bias, s.channels);
  Tensor grad_x = need_input ? pooled_empty(size_of(x), x.scalar_type(), true) : torch::stable::new_empty(x, {0});
  Tensor grad_weight = floats(x, {s.channels}), grad_bias = floats(x, {s.channels});
  if (x.numel() == 0) {
    std::fill_n(data(grad_weight), s.channels, 0.0f);
    std::fill_n(data(grad_bias), s.channels, 0.0f);
    return {grad_x, grad_weight, grad_bias};
  }
  void* const gx = need_input ? grad_x.mutable_data_ptr() : nullptr;
  const float negative = static_cast<float>(slope);
  if (x.scalar_type() == ScalarType::Float) {
    backward(s, training_kernels().float32, static_cast<const float*>(grad.const_data_ptr()), static_cast<const float*>(x.const_data_ptr()), m, r, w, b,
             negative, static_cast<float*>(gx), data(grad_weight), data(grad_bias));
  } else {
    backward(s, training_kernels().bfloat16, static_cast<const uint16_t*>(grad.const_data_ptr()), static_cast<const uint16_t*>(x.const_data_ptr()), m, r,
             w, b, negative, static_cast<uint16_t*>(gx), data(grad_weight), data(grad_bias));
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace tucker_ops::cpu

STABLE_TORCH_LIBRARY_IMPL(tucker_ops, CPU, m) {
  m.impl("_norm_act_cpu", TORCH_BOX(&tucker_ops::cpu::norm_act));
  m.impl("_norm_act_again_cpu", TORCH_BOX(&tucker_ops::cpu::norm_act_again));
  m.impl("_norm_act_backward_cpu", TORCH_BOX(&tucker_ops::cpu::norm_act_backward));
}
