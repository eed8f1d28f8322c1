// tucker_ops::_tucker_conv_cuda, _tucker_block_cuda and _tucker_merge_cuda.
//
// Arguments have been checked and laid out in Python; the checks here only guard callers that reach the ops without it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "execute.h"
#if defined(TUCKER_EMULATED_GPU)
#include "emulation.h"
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace tucker_ops::cuda {
namespace {

using Optionals = std::vector<std::optional<Tensor>>;

#if defined(TUCKER_EMULATED_GPU)
bool on_gpu(const Tensor& tensor) { return tensor.is_cpu(); }
#else
bool on_gpu(const Tensor& tensor) { return tensor.is_cuda(); }
#endif

// Its data, which the emulated kernels may touch from now on.
const void* lend(const Tensor& tensor, [[maybe_unused]] bool writable) {
#if defined(TUCKER_EMULATED_GPU)
  emulation::lend(tensor.const_data_ptr(), tensor.numel() * tensor.element_size(), writable);
#endif
  return tensor.const_data_ptr();
}

bool is_dense_channels_last(const Tensor& tensor) {
  int64_t expected = tensor.size(1);
  if (tensor.size(1) != 1 && tensor.stride(1) != 1) return false;
  for (int64_t axis = tensor.dim() - 1; axis >= 2; --axis) {
    if (tensor.size(axis) != 1 && tensor.stride(axis) != expected) return false;
    expected *= tensor.size(axis);
  }
  return tensor.size(0) == 1 || tensor.stride(0) == expected;
}

void check_weight(const char* op, const std::optional<Tensor>& tensor, const Tensor& core, const std::vector<int64_t>& size) {
  if (!tensor) return;
  bool fits = tensor->dim() == static_cast<int64_t>(size.size());
  for (size_t axis = 0; fits && axis < size.size(); ++axis) fits = tensor->size(axis) == size[axis];
  STD_TORCH_CHECK(fits && tensor->scalar_type() == core.scalar_type() && on_gpu(*tensor) && tensor->is_contiguous(), op,
                  ": weights do not fit together, or are not contiguous, or not of the core's dtype and device");
}

// What the kernels rely on.
void check(const Call& call) {
  const Tensor& core = *call.core;
  const int64_t ndim = core.dim() - 2, count = call.sources.size();
  const auto fits = [&](size_t size) { return static_cast<int64_t>(size) == count; };
  STD_TORCH_CHECK(count > 0 && count <= kMostSources && fits(call.expand.size()) && fits(call.scale.size()) && fits(call.shift.size()) &&
                      fits(call.slope.size()) && fits(call.reduce.size()),
                  call.op, ": takes 1 to ", kMostSources, " sources and as many of what belongs to them");
  STD_TORCH_CHECK((ndim == 2 || ndim == 3) && static_cast<int64_t>(call.stride.size()) == ndim && static_cast<int64_t>(call.padding.size()) == ndim &&
                      static_cast<int64_t>(call.dilation.size()) == ndim,
                  call.op, ": geometry must have the core's 2 or 3 spatial axes");
  const ScalarType dtype = core.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, call.op,
                  ": computes float16, bfloat16 and float32");
  STD_TORCH_CHECK(on_gpu(core) && core.is_contiguous() && core.numel() > 0, call.op, ": the core must be contiguous, on the GPU and not empty");
  const int64_t rank_out = core.size(0), out_channels = call.u_out ? call.u_out->size(0) : rank_out;
  int64_t rows = 0;
  bool each_makes_all = true;
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& source = call.sources[i];
    STD_TORCH_CHECK(source.dim() == ndim + 2 && source.size(0) == call.sources[0].size(0) && source.scalar_type() == dtype && on_gpu(source) &&
                        is_dense_channels_last(source) && source.size(1) > 0,
                    call.op, ": sources must be dense, channels-last, of the core's axes, dtype and device, and of one batch");
    int64_t channels = source.size(1);
    if (call.expand[i]) {
      STD_TORCH_CHECK(call.expand[i]->dim() == 2, call.op, ": expand must be [C, R]");
      check_weight(call.op, call.expand[i], core, {call.expand[i]->size(0), channels});
      channels = call.expand[i]->size(0);
    }
    for (const auto& pending : {call.scale[i], call.shift[i]}) {
      STD_TORCH_CHECK(!pending || (pending->scalar_type() == ScalarType::Float && on_gpu(*pending) && pending->dim() == 2 &&
                                   pending->size(0) == source.size(0) && pending->size(1) == channels && pending->is_contiguous()),
                      call.op, ": scale and shift must be contiguous float32 [N, C]");
    }
    int64_t own = channels;
    if (const auto& matrix = call.reduce[i]) {
      STD_TORCH_CHECK((matrix->dim() == 2 || matrix->dim() == ndim + 2) && matrix->size(matrix->dim() - 1) == channels &&
                          matrix->scalar_type() == dtype && on_gpu(*matrix) && matrix->is_contiguous() && matrix->numel() > 0,
                      call.op, ": reduce must be contiguous, [rows, C] or [*s, rows, C], of the core's dtype and device");
      own = matrix->size(matrix->dim() - 2);
    }
    rows += own;
    each_makes_all = each_makes_all && call.reduce[i] && own == core.size(1);
  }
  STD_TORCH_CHECK(rows == core.size(1) || each_makes_all, call.op, ": sources must make all inputs of the core each, or together");
  if (call.u_out) check_weight(call.op, call.u_out, core, {call.u_out->size(0), rank_out});
  check_weight(call.op, call.in_bias, core, {core.size(1)});
  check_weight(call.op, call.bias, core, {out_channels});
  STD_TORCH_CHECK(call.stats != "covariance" || (!call.u_out && !call.contiguous), call.op,
                  ": takes the covariance of the core's output only, channels-last");
}

Tensor tucker_conv(const Tensor& input, const Tensor& u_in, const Tensor& core, const Tensor& u_out, std::optional<Tensor> bias,
                   std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, std::vector<int64_t> device,
                   std::vector<int64_t> choice) {
  Call call{"tucker_ops::_tucker_conv_cuda", {input}, {std::nullopt}, {std::nullopt}, {std::nullopt}, {u_in}, {1.0}, std::nullopt, u_out, bias,
            &core, stride, padding, dilation, "none", false, false, device, choice};
  check(call);
  return execute(call).values;
}

std::tuple<Tensor, Tensor, Tensor> tucker_block(std::vector<Tensor> sources, Optionals expand, Optionals scale, Optionals shift,
                                                std::vector<double> slope, Optionals reduce, std::optional<Tensor> in_bias,
                                                const Tensor& core, std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                std::vector<int64_t> dilation, std::optional<Tensor> u_out, std::optional<Tensor> bias,
                                                std::string stats, bool contiguous, bool float32_values, std::vector<int64_t> device, std::vector<int64_t> choice) {
  Call call{"tucker_ops::_tucker_block_cuda", sources, expand, scale, shift, reduce, slope, in_bias, u_out, bias,
            &core, stride, padding, dilation, stats, contiguous, float32_values, device, choice};
  check(call);
  Result result = execute(call);
  return {result.values, result.mean, result.m2};
}

Tensor tucker_merge(std::vector<Tensor> values, Optionals scale, Optionals shift, std::vector<double> slope, double out_slope) {
  constexpr const char* kOp = "tucker_ops::_tucker_merge_cuda";
  STD_TORCH_CHECK(!values.empty() && values.size() <= kMostSources && scale.size() == values.size() && shift.size() == values.size() &&
                      slope.size() == values.size(),
                  kOp, ": takes 1 to ", kMostSources, " values and as many of what belongs to them");
  const Tensor& first = values[0];
  const ScalarType dtype = first.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, kOp,
                  ": computes float16, bfloat16 and float32");
  OnDevice on(first);
  MergeParams p{};
  p.values = static_cast<int>(values.size());
  p.out_slope = static_cast<float>(out_slope);
  p.batch = static_cast<int>(first.size(0));
  p.channels = static_cast<int>(first.size(1));
  p.voxels = 1;
  for (int64_t axis = 2; axis < first.dim(); ++axis) p.voxels *= first.size(axis);
  Tensor output = torch::stable::empty_like(first);
  if (output.numel() == 0) return output;
  for (int i = 0; i < p.values; ++i) {
    const Tensor& value = values[i];
    bool same = value.dim() == first.dim() && value.scalar_type() == dtype && on_gpu(value) && is_dense_channels_last(value);
    for (int64_t axis = 0; same && axis < first.dim(); ++axis) same = value.size(axis) == first.size(axis);
    STD_TORCH_CHECK(same, kOp, ": values must be dense, channels-last and of one shape, dtype and device");
    p.value[i] = lend(value, false);
    p.slope[i] = static_cast<float>(slope[i]);
    const std::optional<Tensor>* pending[2] = {&scale[i], &shift[i]};
    for (int which = 0; which < 2; ++which) {
      if (!*pending[which]) continue;
      const Tensor& tensor = **pending[which];
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && on_gpu(tensor) && tensor.is_contiguous() && tensor.dim() == 2 &&
                          tensor.size(0) == p.batch && tensor.size(1) == p.channels,
                      kOp, ": scale and shift must be contiguous float32 [N, C]");
      (which ? p.shift : p.scale)[i] = static_cast<const float*>(lend(tensor, false));
    }
  }
  lend(output, true);
  p.y = output.mutable_data_ptr();
  p.vectors = reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
  for (int i = 0; i < p.values; ++i) p.vectors = p.vectors && reinterpret_cast<uintptr_t>(p.value[i]) % 16 == 0;
  const Kind kind = dtype == ScalarType::Half ? Kind::kFp16 : dtype == ScalarType::BFloat16 ? Kind::kBf16 : Kind::kFp32;
  const std::string error = start_merge(kind, p, on.stream());
  STD_TORCH_CHECK(error.empty(), kOp, ": ", error);
  return output;
}

std::tuple<Tensor, Tensor> norm_affine(const Tensor& mean, const Tensor& m2, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                       int64_t count, double eps) {
  constexpr const char* kOp = "tucker_ops::_norm_affine_cuda";
  OnDevice on(mean);
  Tensor scale = torch::stable::empty_like(mean), shift = torch::stable::empty_like(mean);
  for (const Tensor& tensor : {mean, m2})
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.scalar_type() == ScalarType::Float && on_gpu(tensor) && tensor.is_contiguous() &&
                        tensor.size(0) == mean.size(0) && tensor.size(1) == mean.size(1) && count > 0,
                    kOp, ": mean and m2 must be contiguous float32 [N, C] of at least one value");
  NormParams p{};
  p.total = static_cast<int>(mean.numel());
  p.channels = static_cast<int>(mean.size(1));
  if (p.total == 0) return {scale, shift};
  const auto set = [&](const std::optional<Tensor>& tensor, const void*& values, int& bytes, bool& bf16) {
    if (!tensor) return;
    const ScalarType dtype = tensor->scalar_type();
    STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16) && tensor->dim() == 1 &&
                        tensor->size(0) == p.channels && on_gpu(*tensor) && tensor->is_contiguous(),
                    kOp, ": weight and bias must be contiguous [C] in float32, float16 or bfloat16");
    values = lend(*tensor, false);
    bytes = static_cast<int>(tensor->element_size());
    bf16 = dtype == ScalarType::BFloat16;
  };
  set(weight, p.weight, p.weight_bytes, p.weight_is_bf16);
  set(bias, p.bias, p.bias_bytes, p.bias_is_bf16);
  p.mean = static_cast<const float*>(lend(mean, false));
  p.m2 = static_cast<const float*>(lend(m2, false));
  lend(scale, true);
  lend(shift, true);
  p.scale = static_cast<float*>(scale.mutable_data_ptr());
  p.shift = static_cast<float*>(shift.mutable_data_ptr());
  p.count = static_cast<float>(count);
  p.eps = static_cast<float>(eps);
  const std::string error = start_norm_affine(p, on.stream());
  STD_TORCH_CHECK(error.empty(), kOp, ": ", error);
  return {scale, shift};
}

}  // namespace
}  // namespace tucker_ops::cuda

#if defined(TUCKER_EMULATED_GPU)
STABLE_TORCH_LIBRARY_IMPL(tucker_ops, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(tucker_ops, CUDA, m) {
#endif
  m.impl("_tucker_conv_cuda", TORCH_BOX(&tucker_ops::cuda::tucker_conv));
  m.impl("_tucker_block_cuda", TORCH_BOX(&tucker_ops::cuda::tucker_block));
  m.impl("_tucker_merge_cuda", TORCH_BOX(&tucker_ops::cuda::tucker_merge));
  m.impl("_norm_affine_cuda", TORCH_BOX(&tucker_ops::cuda::norm_affine));
}
