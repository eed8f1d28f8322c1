// tucker_ops::_tucker_conv_cpu: unpacks tensors, packs weights, cuts the output into tiles, runs threads.
//
// Arguments have been checked in Python; the checks here only guard callers that reach the op without it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "isa.h"
#include "one_pass.h"

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace tucker_ops::cpu {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kMostGeometry = INT32_MAX;
// The ring and the output plane of a tile should stay in a core's L2 cache, half of the 512 KB that small server
// cores have; weights and input stream through the other half.
constexpr int64_t kTileBytes = 256 * 1024;
constexpr int64_t kMostTileBytes = 16 * kTileBytes;
constexpr int64_t kMinMacsPerThread = 200'000;
constexpr int64_t kMinPackedPerThread = 20'000;

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats allocate(int64_t count) {
  const int64_t bytes = ceil_div(count * sizeof(float), kAlignment) * kAlignment;
  return Floats(static_cast<float*>(std::aligned_alloc(kAlignment, std::max(bytes, kAlignment))));
}

float to_float(float value) { return value; }
float to_float(uint16_t bfloat16) {
  const uint32_t wide = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof(value));
  return value;
}

// One reduction axis: `count` steps of `stride` elements.
struct Axis {
  int64_t count, stride;
};

// weight[channel][offset] for a block of `width` channels, of which the first `count` exist.
template <class T>
void pack_block(const T* weight, int64_t channel_stride, const std::vector<int64_t>& offsets, int64_t count,
                int64_t width, float* out) {
  for (int64_t offset : offsets) {
    for (int64_t lane = 0; lane < count; ++lane) out[lane] = to_float(weight[lane * channel_stride + offset]);
    for (int64_t lane = count; lane < width; ++lane) out[lane] = 0.0f;
    out += width;
  }
}

// Packs weight[channel][axes…] into blocks of 2·lanes channels (see OnePass), axes in the order given.
Floats pack(const Tensor& weight, const std::vector<Axis>& axes, int64_t lanes) {
  const int64_t channels = weight.size(0), stride = weight.stride(0);
  std::vector<int64_t> offsets{0};
  for (const Axis& axis : axes) {
    std::vector<int64_t> next;
    next.reserve(offsets.size() * axis.count);
    for (int64_t offset : offsets)
      for (int64_t i = 0; i < axis.count; ++i) next.push_back(offset + i * axis.stride);
    offsets.swap(next);
  }
  const int64_t reduction = offsets.size(), block = 2 * lanes, blocks = ceil_div(channels, block);
  Floats packed = allocate(reduction * blocks * block);
  if (!packed) return packed;
  const bool is_float = weight.scalar_type() == ScalarType::Float;
  const void* data = weight.const_data_ptr();
  const int64_t grain = std::max<int64_t>(1, kMinPackedPerThread / (reduction * block));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t c = b * block, count = std::min(block, channels - c), width = count > lanes ? block : lanes;
      float* out = packed.get() + c * reduction;
      if (is_float) {
        pack_block(static_cast<const float*>(data) + c * stride, stride, offsets, count, width, out);
      } else {
        pack_block(static_cast<const uint16_t*>(data) + c * stride, stride, offsets, count, width, out);
      }
    }
  });
  return packed;
}

int64_t halo(const Geometry& g, int axis, int64_t extent) {
  return (extent - 1) * g.stride[axis] + (g.kernel[axis] - 1) * g.dilation[axis] + 1;
}

Tiles tile_of(const Geometry& g, int64_t rows, int64_t cols) {
  Tiles t;
  t.rows = rows;
  t.cols = cols;
  t.rows_in = halo(g, 1, rows);
  t.cols_in = halo(g, 2, cols);
  t.slots = std::min((g.kernel[0] - 1) * g.dilation[0] + 1, std::max<int64_t>(g.in[0], 1));
  t.row_tiles = ceil_div(g.out[1], rows);
  t.col_tiles = ceil_div(g.out[2], cols);
  return t;
}

// Work of a tile per output voxel, in MACs: what the halo adds to the first stage, and a surcharge for tiles
// that leave the cache. Input outside the volume costs nothing, and rows that no output reads are skipped.
double work_per_voxel(const Geometry& g, const Tiles& t, int64_t bytes) {
  const double rows_read = std::min({t.rows_in, t.rows * g.kernel[1], g.in[1]});
  const double cols_read = std::min(t.cols_in, g.in[2]);
  const double reduce = rows_read * cols_read * g.stride[0] * g.rank_in * g.in_channels;
  const double taps = static_cast<double>(g.kernel[0]) * g.kernel[1] * g.kernel[2];
  const double rest = (taps * g.rank_in + g.out_channels) * g.rank_out;
  const double surcharge = bytes <= kTileBytes ? 1.0 : bytes <= 4 * kTileBytes ? 1.2 : 1.5;
  return (reduce / (t.rows * t.cols) + rest) * surcharge;
}

// The tile of least work among the largest that fit each of a few limits; a wide dilation makes halos that
// are worth a larger tile than the cache holds.
Tiles choose_tiles(const Geometry& g, int64_t lanes) {
  auto bytes = [&](const Tiles& t) {
    return (ring_floats(g, t, lanes) + plane_floats(g, t, lanes)) * static_cast<int64_t>(sizeof(float));
  };
  Tiles best = tile_of(g, 1, 1);
  // Not the work of that tile: without a halo all tiles tie, and the first, of whole rows, must win.
  double least = std::numeric_limits<double>::infinity();
  for (int64_t limit = kTileBytes; limit <= kMostTileBytes; limit *= 4) {
    for (int64_t cols = g.out[2];; cols = ceil_div(cols, 2)) {
      // Bytes grow linearly with rows, so the most that fit follow from two sizes.
      const int64_t one = bytes(tile_of(g, 1, cols)), step = g.out[1] > 1 ? bytes(tile_of(g, 2, cols)) - one : 1;
      if (one <= limit) {
        const int64_t most = std::min(g.out[1], 1 + (limit - one) / step);
        const Tiles tile = tile_of(g, ceil_div(g.out[1], ceil_div(g.out[1], most)), cols);
        const double work = work_per_voxel(g, tile, bytes(tile));
        if (work < least) {
          least = work;
          best = tile;
        }
      }
      if (cols == 1) break;
    }
  }
  return best;
}

Strides strides_of(const Tensor& tensor, int64_t ndim) {
  Strides s{};
  s.batch = tensor.stride(0);
  s.channel = tensor.stride(1);
  for (int64_t axis = 0; axis < ndim; ++axis) s.space[3 - ndim + axis] = tensor.stride(2 + axis);
  return s;
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

  const char* isa = std::getenv("TUCKER_CPU_ISA");
  const Kernels* kernels = select_kernels(isa);
  STD_TORCH_CHECK(kernels, "TUCKER_CPU_ISA=", isa, " cannot run on this processor; it has ", tucker_ops_cpu_isas());
  const int64_t lanes = kernels->lanes;

  // Reduction order of the core: taps, then input ranks.
  std::vector<Axis> core_axes;
  for (int64_t axis = 0; axis < ndim; ++axis) core_axes.push_back({core.size(2 + axis), core.stride(2 + axis)});
  core_axes.push_back({g.rank_in, core.stride(1)});
  const Floats packed_in = pack(u_in, {{g.in_channels, u_in.stride(1)}}, lanes);
  const Floats packed_core = pack(core, core_axes, lanes);
  const Floats packed_out = pack(u_out, {{g.rank_out, u_out.stride(1)}}, lanes);
  const int64_t padded = ceil_div(g.out_channels, 2 * lanes) * 2 * lanes;
  const Floats packed_bias = bias ? pack(*bias, {}, lanes) : allocate(padded);
  STD_TORCH_CHECK(packed_in && packed_core && packed_out && packed_bias,
                  "tucker_ops::_tucker_conv_cpu: no memory for packed weights");
  if (!bias) std::fill_n(packed_bias.get(), padded, 0.0f);

  OnePass pass{};
  pass.g = g;
  pass.tiles = choose_tiles(g, lanes);
  pass.x = input.const_data_ptr();
  pass.y = output.mutable_data_ptr();
  pass.x_strides = x_strides;
  pass.y_strides = strides_of(output, ndim);
  pass.u_in = packed_in.get();
  pass.core = packed_core.get();
  pass.u_out = packed_out.get();
  pass.bias = packed_bias.get();

  const int64_t units = g.batch * pass.tiles.row_tiles * pass.tiles.col_tiles * g.out[0];
  const int64_t macs_per_voxel = g.rank_in * g.rank_out * g.kernel[0] * g.kernel[1] * g.kernel[2] +
                                 g.rank_out * g.out_channels + g.rank_in * g.in_channels;
  const int64_t grain = std::max<int64_t>(
      1, kMinMacsPerThread / std::max<int64_t>(1, macs_per_voxel * pass.tiles.rows * pass.tiles.cols));
  const auto run = dtype == ScalarType::Float ? kernels->float32 : kernels->bfloat16;
  const int64_t scratch_size = scratch_floats(g, pass.tiles, lanes);
  std::atomic<bool> out_of_memory{false};
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
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

STABLE_TORCH_LIBRARY_IMPL(tucker_ops, CPU, m) {
  m.impl("_tucker_conv_cpu", TORCH_BOX(&tucker_ops::cpu::tucker_conv));
}
