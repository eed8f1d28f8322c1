// tucker_ops::_tucker_conv_cpu: unpacks tensors and runs threads.
//
// Arguments have been checked in Python; the checks here only guard callers that reach the op without it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "isa.h"
#include "one_pass.h"
#include "tiles.h"
#include "weights.h"

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace tucker_ops::cpu {
namespace {

constexpr int64_t kMostGeometry = INT32_MAX;
constexpr int64_t kMinMacsPerThread = 200'000;
// From published cycles: 16×16×16 multiply-adds of pairs in 8 to 16 cycles, 2 × 16 of float32 in one. Not measured.
constexpr int64_t kMatrixSpeed = 8;

WeightView view_of(const Tensor& tensor) {
  WeightView view{tensor.const_data_ptr(), tensor.scalar_type() == ScalarType::Float, {}, {}};
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    view.sizes.push_back(tensor.size(axis));
    view.strides.push_back(tensor.stride(axis));
  }
  return view;
}

// TUCKER_CPU_CORE, for tests: direct, winograd2 or winograd4 wherever the problem allows it. False if it names no other.
bool read_core(std::optional<int64_t>& winograd) {
  const char* name = std::getenv("TUCKER_CPU_CORE");
  if (!name || !*name) return true;
  const std::string core = name;
  if (core == "direct") winograd = 0;
  if (core == "winograd2") winograd = 2;
  if (core == "winograd4") winograd = 4;
  return winograd.has_value();
}

Strides strides_of(const Tensor& tensor, int64_t ndim) {
  Strides s{};
  s.batch = tensor.stride(0);
  s.channel = tensor.stride(1);
  for (int64_t axis = 0; axis < ndim; ++axis) s.space[3 - ndim + axis] = tensor.stride(2 + axis);
  return s;
}

Units units_of(const Kernels& kernels, bool bfloat16) {
  const int64_t channels = bfloat16 && kernels.pairs ? 2 : 1;
  return {kernels.lanes, channels, bfloat16 && kernels.matrix ? kMatrixSpeed : channels};
}

Tiles tiles_of_call(const Geometry& g, const Layouts& layouts, const Units& u, std::optional<int64_t> winograd) {
  const int64_t threads = torch::stable::get_num_threads();
  const std::optional<Tiles> tiles = choose_tiles(g, layouts, u, winograd, threads);
  return tiles ? *tiles : *choose_tiles(g, layouts, u, std::nullopt, threads);
}

// A fresh tensor of this size comes page by page from the kernel, which can take as long as computing it. From
// 32 MB on, glibc never takes memory from its heap, so the advice ends with the tensor.
void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t huge = 2 * 1024 * 1024, least = 16 * huge;
  if (bytes < least) return;
  const int64_t begin = ceil_div(reinterpret_cast<intptr_t>(data), huge) * huge;
  const int64_t end = (reinterpret_cast<intptr_t>(data) + bytes) / huge * huge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Tensor tucker_conv(const Tensor& input, const Tensor& u_in, const Tensor& core, const Tensor& u_out,
                   std::optional<Tensor> bias, std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation) {
  const int64_t ndim = core.dim() - 2;
  STD_TORCH_CHECK((ndim == 2 || ndim == 3) && input.dim() == ndim + 2 && static_cast<int64_t>(stride.size()) == ndim &&
                      static_cast<int64_t>(padding.size()) == ndim && static_cast<int64_t>(dilation.size()) == ndim,
                  "tucker_ops::_tucker_conv_cpu: input and geometry must have the core's 2 or 3 spatial axes");
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "tucker_ops::_tucker_conv_cpu: computes float32 and bfloat16");
  for (const Tensor& weight : {u_in, core, u_out, bias.value_or(u_out)})
    STD_TORCH_CHECK(weight.scalar_type() == dtype && weight.is_cpu() && input.is_cpu(),
                    "tucker_ops::_tucker_conv_cpu: weights must have the input's dtype and be on the CPU");

  Geometry g{};
  g.batch = input.size(0);
  g.in_channels = input.size(1);
  g.rank_in = core.size(1);
  g.rank_out = core.size(0);
  g.out_channels = u_out.size(0);
  STD_TORCH_CHECK(u_in.dim() == 2 && u_out.dim() == 2 && u_in.size(0) == g.rank_in && u_in.size(1) == g.in_channels &&
                      u_out.size(1) == g.rank_out && (!bias || (bias->dim() == 1 && bias->size(0) == g.out_channels)),
                  "tucker_ops::_tucker_conv_cpu: weights do not fit together");
  STD_TORCH_CHECK(g.in_channels > 0 && g.rank_in > 0 && g.rank_out > 0 && g.out_channels > 0,
                  "tucker_ops::_tucker_conv_cpu: channels and ranks must be at least 1");
  std::vector<int64_t> out_size{g.batch, g.out_channels};
  for (int64_t axis = 0; axis < 3; ++axis) {
    const int64_t a = axis - (3 - ndim);
    g.in[axis] = a < 0 ? 1 : input.size(2 + a);
    g.kernel[axis] = a < 0 ? 1 : core.size(2 + a);
    g.stride[axis] = a < 0 ? 1 : stride[a];
    g.padding[axis] = a < 0 ? 0 : padding[a];
    g.dilation[axis] = a < 0 ? 1 : dilation[a];
    STD_TORCH_CHECK(g.in[axis] > 0 && g.kernel[axis] > 0 && g.kernel[axis] <= kMostGeometry && g.stride[axis] > 0 &&
                        g.stride[axis] <= kMostGeometry && g.dilation[axis] > 0 && g.dilation[axis] <= kMostGeometry &&
                        g.padding[axis] >= 0 && g.padding[axis] <= kMostGeometry,
                    "tucker_ops::_tucker_conv_cpu: extents, kernel, stride, padding and dilation must be positive and "
                    "below 2^31 (padding may be 0)");
    const int64_t room = g.in[axis] + 2 * g.padding[axis] - g.dilation[axis] * (g.kernel[axis] - 1) - 1;
    STD_TORCH_CHECK(room >= 0, "tucker_ops::_tucker_conv_cpu: the kernel does not fit into the padded input");
    g.out[axis] = room / g.stride[axis] + 1;
    if (a >= 0) out_size.push_back(g.out[axis]);
  }

  const MemoryFormat channels_last = ndim == 2 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
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
  Tensor output = torch::stable::empty(out_size, dtype, std::nullopt, std::nullopt, std::nullopt,
                                       as_channels_last ? channels_last : MemoryFormat::Contiguous);
  if (output.numel() == 0) return output;
  advise_huge_pages(output.mutable_data_ptr(), output.numel() * (dtype == ScalarType::Float ? 4 : 2));

  const char* isa = std::getenv("TUCKER_CPU_ISA");
  const Kernels* kernels = select_kernels(isa);
  STD_TORCH_CHECK(kernels, "TUCKER_CPU_ISA=", isa, " cannot run on this processor; it has ", tucker_ops_cpu_isas());
  const Units units = units_of(*kernels, dtype == ScalarType::BFloat16);

  const Strides y_strides = strides_of(output, ndim);
  const Layouts layouts{x_strides.channel == 1, y_strides.channel == 1};
  std::optional<int64_t> winograd;
  STD_TORCH_CHECK(read_core(winograd), "TUCKER_CPU_CORE=", std::getenv("TUCKER_CPU_CORE"),
                  " is not known; leave it unset, or set direct, winograd2 or winograd4");
  const Tiles tiles = tiles_of_call(g, layouts, units, winograd);
  const std::optional<WeightView> bias_view = bias ? std::optional(view_of(*bias)) : std::nullopt;
  const Weights weights{view_of(u_in), view_of(core), view_of(u_out), bias_view ? &*bias_view : nullptr};
  const std::shared_ptr<const PackedWeights> packed = packed_weights(weights, units, tiles.winograd);
  STD_TORCH_CHECK(packed, "tucker_ops::_tucker_conv_cpu: no memory for packed weights");

  OnePass pass{};
  pass.g = g;
  pass.tiles = tiles;
  pass.x = input.const_data_ptr();
  pass.y = output.mutable_data_ptr();
  pass.x_strides = x_strides;
  pass.y_strides = y_strides;
  pass.u_in = packed->u_in.get();
  pass.core = packed->core.get();
  pass.u_out = packed->u_out.get();
  pass.bias = packed->bias.get();

  const int64_t planes = g.batch * pass.tiles.row_tiles * pass.tiles.col_tiles * g.out[0];
  const int64_t macs_per_voxel = g.rank_in * g.rank_out * g.kernel[0] * g.kernel[1] * g.kernel[2] +
                                 g.rank_out * g.out_channels + g.rank_in * g.in_channels;
  const int64_t grain = std::max<int64_t>(
      1, kMinMacsPerThread / std::max<int64_t>(1, macs_per_voxel * pass.tiles.rows * pass.tiles.cols));
  const auto run = dtype == ScalarType::Float ? kernels->float32 : kernels->bfloat16;
  const int64_t scratch_size = scratch_of(g, pass.tiles, units).total;
  std::atomic<bool> out_of_memory{false};
  torch::stable::parallel_for(0, planes, grain, [&](int64_t begin, int64_t end) {
    const Floats scratch = allocate(scratch_size);
    if (scratch) {
      run(pass, begin, end, scratch.get());
    } else {
      out_of_memory = true;
    }
  });
  STD_TORCH_CHECK(!out_of_memory, "tucker_ops::_tucker_conv_cpu: no memory for ", scratch_size * 4,
                  " bytes of scratch per thread");
  return output;
}

}  // namespace
}  // namespace tucker_ops::cpu

extern "C" __attribute__((visibility("default"))) int tucker_ops_cpu_tiles(const int64_t* numbers, int64_t* result) {
  using namespace tucker_ops::cpu;
  tucker_ops::Geometry g{};
  int64_t* const scalars[] = {&g.batch, &g.in_channels, &g.rank_in, &g.rank_out, &g.out_channels};
  for (int64_t* scalar : scalars) *scalar = *numbers++;
  for (int64_t* triple : {g.in, g.out, g.kernel, g.stride, g.padding, g.dilation})
    for (int axis = 0; axis < 3; ++axis) triple[axis] = *numbers++;
  const Kernels* kernels = select_kernels(std::getenv("TUCKER_CPU_ISA"));
  std::optional<int64_t> winograd;
  if (!kernels || !read_core(winograd)) return 0;
  const Tiles tiles = tiles_of_call(g, {numbers[0] != 0, numbers[0] != 0}, units_of(*kernels, numbers[1] != 0), winograd);
  result[0] = tiles.winograd;
  result[1] = tiles.rows;
  result[2] = tiles.cols;
  return 1;
}

STABLE_TORCH_LIBRARY_IMPL(tucker_ops, CPU, m) {
  m.impl("_tucker_conv_cpu", TORCH_BOX(&tucker_ops::cpu::tucker_conv));
}
