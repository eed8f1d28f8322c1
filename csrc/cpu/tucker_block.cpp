// tucker_ops::_tucker_block_cpu: a convolution with the norm and activation before it and statistics for the one after.
//
// Arguments have been checked in Python; the checks here only guard callers that reach the op without it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "execute.h"
#include "pool.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace tucker_ops::cpu {
namespace {

constexpr const char* kOp = "tucker_ops::_tucker_block_cpu";
using Optionals = std::vector<std::optional<Tensor>>;

std::vector<int64_t> extents_of(const Tensor& tensor) {
  std::vector<int64_t> extents;
  for (int64_t axis = 2; axis < tensor.dim(); ++axis) extents.push_back(tensor.size(axis));
  return extents;
}

// [N, C] float32 for every source that has one.
const float* pending(const std::optional<Tensor>& tensor, int64_t batch, int64_t channels) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_cpu() && tensor->dim() == 2 &&
                      tensor->size(0) == batch && tensor->size(1) == channels && tensor->is_contiguous(),
                  kOp, ": scale and shift must be contiguous float32 [N, C]");
  return static_cast<const float*>(tensor->const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> tucker_block(std::vector<Tensor> sources, Optionals expand, Optionals scale,
                                                Optionals shift, std::vector<double> slope, Optionals reduce,
                                                std::optional<Tensor> in_bias, const Tensor& core,
                                                std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                std::vector<int64_t> dilation, std::optional<Tensor> u_out,
                                                std::optional<Tensor> bias, std::string stats, bool contiguous, bool float32_values) {
  const int64_t ndim = core.dim() - 2, count = sources.size();
  STD_TORCH_CHECK(count > 0 && count <= kMostSources && static_cast<int64_t>(scale.size()) == count &&
                      static_cast<int64_t>(shift.size()) == count && static_cast<int64_t>(slope.size()) == count &&
                      static_cast<int64_t>(reduce.size()) == count && static_cast<int64_t>(expand.size()) == count,
                  kOp, ": takes 1 to ", kMostSources, " sources and as many of what belongs to them");
  STD_TORCH_CHECK((ndim == 2 || ndim == 3) && static_cast<int64_t>(stride.size()) == ndim &&
                      static_cast<int64_t>(padding.size()) == ndim && static_cast<int64_t>(dilation.size()) == ndim,
                  kOp, ": geometry must have the core's 2 or 3 spatial axes");
  const ScalarType dtype = core.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, kOp, ": computes float32 and bfloat16");

  OnePass pass{};
  Geometry& g = pass.g;
  g.batch = sources[0].size(0);
  g.rank_in = core.size(1);
  g.rank_out = core.size(0);
  g.expanded = u_out.has_value();
  g.out_channels = u_out ? u_out->size(0) : g.rank_out;
  std::vector<int64_t> in(ndim, 0), kernel = extents_of(core);
  for (const Tensor& source : sources) {
    STD_TORCH_CHECK(source.dim() == ndim + 2 && source.size(0) == g.batch && source.scalar_type() == dtype && source.is_cpu(),
                    kOp, ": sources must have the core's axes, dtype and device, and one batch");
  }
  // By how much a source's extents are smaller: the leading axes of its matrices.
  auto factor_of = [&](size_t i, int64_t axis) { return reduce[i] && reduce[i]->dim() > 2 ? reduce[i]->size(axis) : 1; };
  for (int64_t axis = 0; axis < ndim; ++axis) {
    STD_TORCH_CHECK(!reduce[0] || reduce[0]->dim() == 2 || reduce[0]->dim() == ndim + 2, kOp, ": reduce must be [R_in, C] or [*s, R_in, C]");
    in[axis] = sources[0].size(2 + axis) * factor_of(0, axis);
  }
  set_geometry(g, kOp, in, kernel, stride, padding, dilation);
  g.covariance = stats == "covariance";
  STD_TORCH_CHECK(!g.covariance || !u_out, kOp, ": takes the covariance of the core's output only");
  auto all_are = [](const std::vector<int64_t>& values, int64_t value) {
    return std::all_of(values.begin(), values.end(), [&](int64_t v) { return v == value; });
  };
  g.convolved = u_out || g.covariance || !all_are(kernel, 1) || !all_are(stride, 1) || !all_are(padding, 0);

  // Channels of the first stage's output that a source makes.
  auto rows_of = [&](int64_t i) {
    if (reduce[i]) return reduce[i]->size(reduce[i]->dim() - 2);
    return expand[i] ? expand[i]->size(0) : sources[i].size(1);
  };
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) rows += rows_of(i);
  const bool side_by_side = rows == g.rank_in;

  Weights weights{};
  weights.reduce.resize(count);
  int64_t offset = 0;
  if (g.convolved) {
    weights.core = view_of(core);
  } else {
    weights.u_out = {core.const_data_ptr(), dtype == ScalarType::Float, {g.rank_out, g.rank_in}, {core.stride(0), core.stride(1)}};
    g.rank_out = g.rank_in;
    g.expanded = true;
  }
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& tensor = sources[i];
    Source& source = pass.sources[i];
    source.x = tensor.const_data_ptr();
    source.strides = strides_of(tensor, ndim);
    source.channels = source.width = tensor.size(1);
    if (expand[i]) {
      const Tensor& matrix = *expand[i];
      STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) > 0 && matrix.size(1) == source.width &&
                          matrix.scalar_type() == dtype && matrix.is_cpu(),
                      kOp, ": expand must be [C, R] of a source [N, R, *], in the sources' dtype");
      source.channels = matrix.size(0);
      g.source_ranks = std::max(g.source_ranks, source.width);
      g.source_macs += source.width * source.channels;
      weights.expand.resize(count);
      weights.expand[i] = view_of(matrix);
    }
    g.in_channels += source.channels;
    STD_TORCH_CHECK(!reduce[i] || ((reduce[i]->dim() == 2 || reduce[i]->dim() == ndim + 2) && reduce[i]->is_contiguous()), kOp,
                    ": reduce must be contiguous, [R_in, C] or [*s, R_in, C]");
    int64_t positions = 1;
    for (int64_t axis = 0; axis < ndim; ++axis) {
      const int64_t factor = factor_of(i, axis);
      STD_TORCH_CHECK(factor > 0 && factor * tensor.size(2 + axis) == in[axis], kOp, ": extents of the sources do not fit together");
      source.factor[3 - ndim + axis] = factor;
      positions *= factor;
    }
    if (positions > 1) g.coarse_channels += ceil_div(source.channels, kMostLanes) * kMostLanes;
    STD_TORCH_CHECK(source.strides.channel == 1 || source.width == 1, kOp, ": sources must be channels-last");
    // A single channel is contiguous whatever its stride says.
    source.strides.channel = 1;
    source.scale = pending(scale[i], g.batch, source.channels);
    source.shift = pending(shift[i], g.batch, source.channels);
    source.slope = static_cast<float>(slope[i]);
    source.rows = rows_of(i);
    source.offset = side_by_side ? offset : 0;
    source.adds = !side_by_side && i > 0;
    offset += source.rows;
    STD_TORCH_CHECK((side_by_side || (reduce[i] && source.rows == g.rank_in)) && source.offset % kMostLanes == 0, kOp,
                    ": sources must make all channels of the core each, or its channels side by side in multiples of ", kMostLanes);
    if (!reduce[i]) continue;
    g.reduce_macs += source.rows * source.channels;
    const Tensor& matrix = *reduce[i];
    STD_TORCH_CHECK(matrix.size(matrix.dim() - 1) == source.channels && matrix.scalar_type() == dtype && matrix.is_cpu(),
                    kOp, ": reduce must be [rows, C] or [*s, rows, C], in the sources' dtype");
    WeightView view = view_of(matrix);
    if (positions > 1) {
      view.sizes = {positions, source.rows, source.channels};
      view.strides = {source.rows * source.channels, source.channels, 1};
    } else {
      view.sizes = {source.rows, source.channels};
      view.strides = {source.channels, 1};
    }
    weights.reduce[i] = view;
  }
  auto vector_of = [&](const std::optional<Tensor>& tensor, int64_t length) -> std::optional<WeightView> {
    if (!tensor) return std::nullopt;
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == length && tensor->scalar_type() == dtype && tensor->is_cpu(), kOp,
                    ": in_bias must be [R_in] and bias [C_out], in the sources' dtype");
    return view_of(*tensor);
  };
  weights.in_bias = vector_of(in_bias, g.rank_in);
  weights.bias = vector_of(bias, g.out_channels);
  if (u_out) {
    STD_TORCH_CHECK(u_out->dim() == 2 && u_out->size(1) == g.rank_out && u_out->scalar_type() == dtype && u_out->is_cpu(), kOp,
                    ": u_out must be [C_out, R_out]");
    weights.u_out = view_of(*u_out);
  }
  STD_TORCH_CHECK(g.in_channels > 0 && g.rank_in > 0 && g.rank_out > 0 && g.out_channels > 0, kOp,
                  ": channels and ranks must be at least 1");

  const ScalarType values = float32_values ? ScalarType::Float : dtype;
  Tensor output = pooled_empty(output_size(g, ndim), values, !contiguous);
  const bool wanted = stats != "none";
  const std::vector<int64_t> size{g.batch, wanted ? g.out_channels : 0};
  const std::vector<int64_t> products{g.batch, g.out_channels, g.out_channels};
  Tensor mean = torch::stable::empty(size, ScalarType::Float);
  Tensor m2 = torch::stable::empty(g.covariance ? products : size, ScalarType::Float);
  if (output.numel() == 0) return {output, mean, m2};

  pass.source_count = count;
  pass.y = output.mutable_data_ptr();
  pass.y_is_float = values == ScalarType::Float;
  pass.y_strides = strides_of(output, ndim);
  std::optional<Statistics> statistics;
  if (wanted)
    statistics = {static_cast<float*>(mean.mutable_data_ptr()), static_cast<float*>(m2.mutable_data_ptr())};
  execute(kOp, pass, weights, dtype == ScalarType::BFloat16, statistics);
  return {output, mean, m2};
}

}  // namespace
}  // namespace tucker_ops::cpu

STABLE_TORCH_LIBRARY_IMPL(tucker_ops, CPU, m) {
  m.impl("_tucker_block_cpu", TORCH_BOX(&tucker_ops::cpu::tucker_block));
}
