// From tensors to a pass of the kernels: what the ops of this backend have in common.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "one_pass.h"
#include "weights.h"

namespace tucker_ops::cpu {

WeightView view_of(const torch::stable::Tensor& tensor);

// Of a tensor [N, C, *spatial] with `ndim` spatial axes.
Strides strides_of(const torch::stable::Tensor& tensor, int64_t ndim);

// Fills in's extents, kernel, stride, padding and dilation, and derives the output's; throws where the kernel does not fit.
// The arguments have one entry per spatial axis.
void set_geometry(Geometry& g, const char* op, const std::vector<int64_t>& in, const std::vector<int64_t>& kernel,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation);

// Spatial extents of the output behind `batch` and `channels`.
std::vector<int64_t> output_size(const Geometry& g, int64_t ndim);

// Where statistics of the output go, contiguous: [batch, out_channels] each, or m2 [batch, out_channels, out_channels] of a
// covariance.
struct Statistics {
  float *mean, *m2;
};

// Packs the weights, chooses kernels and tiles, and runs them on torch's threads. `pass` holds geometry, sources and
// output. `op` is named in errors.
void execute(const char* op, OnePass pass, const Weights& weights, bool bfloat16, const std::optional<Statistics>& stats);

// A fresh tensor of this size comes page by page from the kernel, which can take as long as computing it. From
// 32 MB on, glibc never takes memory from its heap, so the advice ends with the tensor.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace tucker_ops::cpu
