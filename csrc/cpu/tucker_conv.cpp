// tucker_ops::_tucker_conv_cpu.
//
// Arguments have been checked in Python; the checks here only guard callers that reach the op without it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "execute.h"
#include "pool.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace tucker_ops::cpu {
namespace {

constexpr const char* kOp = "tucker_ops::_tucker_conv_cpu";

Tensor tucker_conv(const Tensor& input, const Tensor& u_in, const Tensor& core, const Tensor& u_out,
                   std::optional<Tensor> bias, std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation) {
  const int64_t ndim = core.dim() - 2;
  STD_TORCH_CHECK((ndim == 2 || ndim == 3) && input.dim() == ndim + 2 && static_cast<int64_t>(stride.size()) == ndim &&
                      static_cast<int64_t>(padding.size()) == ndim && static_cast<int64_t>(dilation.size()) == ndim,
                  kOp, ": input and geometry must have the core's 2 or 3 spatial axes");
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, kOp, ": computes float32 and bfloat16");
  for (const Tensor& weight : {u_in, core, u_out, bias.value_or(u_out)})
    STD_TORCH_CHECK(weight.scalar_type() == dtype && weight.is_cpu() && input.is_cpu(), kOp,
                    ": weights must have the input's dtype and be on the CPU");

  OnePass pass{};
  Geometry& g = pass.g;
  g.batch = input.size(0);
  g.in_channels = input.size(1);
  g.rank_in = core.size(1);
  g.rank_out = core.size(0);
  g.out_channels = u_out.size(0);
  g.reduce_macs = g.rank_in * g.in_channels;
  STD_TORCH_CHECK(u_in.dim() == 2 && u_out.dim() == 2 && u_in.size(0) == g.rank_in && u_in.size(1) == g.in_channels &&
                      u_out.size(1) == g.rank_out && (!bias || (bias->dim() == 1 && bias->size(0) == g.out_channels)),
                  kOp, ": weights do not fit together");
  STD_TORCH_CHECK(g.in_channels > 0 && g.rank_in > 0 && g.rank_out > 0 && g.out_channels > 0, kOp,
                  ": channels and ranks must be at least 1");
  std::vector<int64_t> in, kernel;
  for (int64_t axis = 0; axis < ndim; ++axis) {
    in.push_back(input.size(2 + axis));
    kernel.push_back(core.size(2 + axis));
  }
  set_geometry(g, kOp, in, kernel, stride, padding, dilation);

  const Strides x_strides = strides_of(input, ndim);
  // The same rule as memory_format in ops/reference.py.
  auto dense_as_channels_last = [&] {
    int64_t expected = g.in_channels;
    if (g.in_channels != 1 && x_strides.channel != 1) return false;
    for (int64_t axis = 2; axis >= 3 - ndim; --axis) {
      if (g.in[axis] != 1 && x_strides.space[axis] != expected) return false;
      expected *= g.in[axis];
    }
    return g.batch == 1 || x_strides.batch == expected;
  };
  const bool as_channels_last = !input.is_contiguous() && dense_as_channels_last();
  Tensor output = pooled_empty(output_size(g, ndim), dtype, as_channels_last);
  if (output.numel() == 0) return output;

  Source& source = pass.sources[0];
  source.x = input.const_data_ptr();
  source.strides = x_strides;
  source.channels = source.width = g.in_channels;
  source.rows = g.rank_in;
  pass.source_count = 1;
  pass.y = output.mutable_data_ptr();
  pass.y_is_float = dtype == ScalarType::Float;
  pass.y_strides = strides_of(output, ndim);
  Weights weights{{view_of(u_in)}, view_of(core), view_of(u_out), std::nullopt, std::nullopt};
  if (bias) weights.bias = view_of(*bias);
  execute(kOp, pass, weights, dtype == ScalarType::BFloat16, std::nullopt);
  return output;
}

}  // namespace
}  // namespace tucker_ops::cpu

STABLE_TORCH_LIBRARY_IMPL(tucker_ops, CPU, m) {
  m.impl("_tucker_conv_cpu", TORCH_BOX(&tucker_ops::cpu::tucker_conv));
}
