#include "execute.h"

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>

#include "isa.h"
#include "tiles.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace tucker_ops::cpu {
namespace {

constexpr int64_t kMostGeometry = INT32_MAX;
constexpr int64_t kMinMacsPerThread = 200'000;
// From published cycles: 16×16×16 multiply-adds of pairs in 8 to 16 cycles, 2 × 16 of float32 in one. Not measured.
constexpr int64_t kMatrixSpeed = 8;

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

// The kernel that runs a call, and the units it multiplies.
struct Chosen {
  Run run;
  Units units;
};

Chosen choose_run(const Kernels& kernels, bool bfloat16) {
  if (!bfloat16) return {kernels.float32, {kernels.lanes, 1}};
  if (!kernels.pairs) return {kernels.bfloat16, {kernels.lanes, 1}};
  return {kernels.pairs, {kernels.lanes, 2, kernels.matrix ? kMatrixSpeed : 2}};
}

Tiles tiles_of_call(const Geometry& g, const Layouts& layouts, const Units& u, std::optional<int64_t> winograd) {
  const int64_t threads = torch::stable::get_num_threads();
  const std::optional<Tiles> tiles = choose_tiles(g, layouts, u, winograd, threads);
  return tiles ? *tiles : *choose_tiles(g, layouts, u, std::nullopt, threads);
}

// Merges what the units of each volume saw, in their order, so that it does not matter which thread took which. The
// number of threads decides on the tiles, and so on the last bits.
void merge_statistics(const OnePass& pass, const Statistics& to) {
  const Geometry& g = pass.g;
  const Tiles& t = pass.tiles;
  const int64_t channels = g.out_channels, partners = g.covariance ? channels : 1;
  std::vector<double> mean(channels), delta(channels), m2(channels * partners);
  const float* from = pass.stats;
  for (int64_t n = 0; n < g.batch; ++n) {
    double seen = 0;
    for (int64_t tile = 0; tile < t.row_tiles * t.col_tiles; ++tile) {
      const int64_t rows = std::min(t.rows, g.out[1] - tile / t.col_tiles * t.rows);
      const int64_t cols = std::min(t.cols, g.out[2] - tile % t.col_tiles * t.cols);
      const double voxels = static_cast<double>(rows * cols);
      for (int64_t depth = 0; depth < g.out[0]; ++depth, from += stats_floats(g, pass.stats_channels), seen += voxels) {
        const double share = voxels / (seen + voxels);
        if (seen == 0) {
          std::copy_n(from, channels, mean.begin());
          std::fill(m2.begin(), m2.end(), 0.0);
        }
        for (int64_t c = 0; c < channels; ++c) {
          delta[c] = from[c] - mean[c];
          mean[c] += delta[c] * share;
        }
        const float* products = from + pass.stats_channels;
        if (!g.covariance) {
          for (int64_t c = 0; c < channels; ++c) m2[c] += products[c] + delta[c] * delta[c] * seen * share;
          continue;
        }
        for (int64_t c = 0; c < channels; ++c, products += pass.stats_channels)
          for (int64_t d = c; d < channels; ++d)
            m2[c * channels + d] += products[d] + delta[c] * delta[d] * seen * share;
      }
    }
    for (int64_t c = 0; g.covariance && c < channels; ++c)
      for (int64_t d = 0; d < c; ++d) m2[c * channels + d] = m2[d * channels + c];
    std::copy_n(mean.begin(), channels, to.mean + n * channels);
    std::copy_n(m2.begin(), channels * partners, to.m2 + n * channels * partners);
  }
}

}  // namespace

WeightView view_of(const Tensor& tensor) {
  WeightView view{tensor.const_data_ptr(), tensor.scalar_type() == ScalarType::Float, {}, {}};
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    view.sizes.push_back(tensor.size(axis));
    view.strides.push_back(tensor.stride(axis));
  }
  return view;
}

Strides strides_of(const Tensor& tensor, int64_t ndim) {
  Strides s{};
  s.batch = tensor.stride(0);
  s.channel = tensor.stride(1);
  for (int64_t axis = 0; axis < ndim; ++axis) s.space[3 - ndim + axis] = tensor.stride(2 + axis);
  return s;
}

void set_geometry(Geometry& g, const char* op, const std::vector<int64_t>& in, const std::vector<int64_t>& kernel,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation) {
  const int64_t ndim = in.size();
  for (int64_t axis = 0; axis < 3; ++axis) {
    const int64_t a = axis - (3 - ndim);
    g.in[axis] = a < 0 ? 1 : in[a];
    g.kernel[axis] = a < 0 ? 1 : kernel[a];
    g.stride[axis] = a < 0 ? 1 : stride[a];
    g.padding[axis] = a < 0 ? 0 : padding[a];
    g.dilation[axis] = a < 0 ? 1 : dilation[a];
    STD_TORCH_CHECK(g.in[axis] > 0 && g.kernel[axis] > 0 && g.kernel[axis] <= kMostGeometry && g.stride[axis] > 0 &&
                        g.stride[axis] <= kMostGeometry && g.dilation[axis] > 0 && g.dilation[axis] <= kMostGeometry &&
                        g.padding[axis] >= 0 && g.padding[axis] <= kMostGeometry,
                    op, ": extents, kernel, stride, padding and dilation must be positive and below 2^31 (padding may be 0)");
    const int64_t room = g.in[axis] + 2 * g.padding[axis] - g.dilation[axis] * (g.kernel[axis] - 1) - 1;
    STD_TORCH_CHECK(room >= 0, op, ": the kernel does not fit into the padded input");
    g.out[axis] = room / g.stride[axis] + 1;
  }
}

std::vector<int64_t> output_size(const Geometry& g, int64_t ndim) {
  std::vector<int64_t> size{g.batch, g.out_channels};
  size.insert(size.end(), g.out + 3 - ndim, g.out + 3);
  return size;
}

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t huge = 2 * 1024 * 1024, least = 16 * huge;
  if (bytes < least) return;
  const int64_t begin = ceil_div(reinterpret_cast<intptr_t>(data), huge) * huge;
  const int64_t end = (reinterpret_cast<intptr_t>(data) + bytes) / huge * huge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void execute(const char* op, OnePass pass, const Weights& weights, bool bfloat16,
             const std::optional<Statistics>& stats) {
  const char* isa = std::getenv("TUCKER_CPU_ISA");
  const Kernels* kernels = select_kernels(isa);
  STD_TORCH_CHECK(kernels, "TUCKER_CPU_ISA=", isa, " cannot run on this processor; it has ", tucker_ops_cpu_isas());
  std::optional<int64_t> winograd;
  STD_TORCH_CHECK(read_core(winograd), "TUCKER_CPU_CORE=", std::getenv("TUCKER_CPU_CORE"),
                  " is not known; leave it unset, or set direct, winograd2 or winograd4");
  Geometry& g = pass.g;
  const auto [run, units] = choose_run(*kernels, bfloat16);
  const Layouts layouts{pass.sources[0].strides.channel == 1, pass.y_strides.channel == 1};
  pass.tiles = tiles_of_call(g, layouts, units, winograd);
  const std::shared_ptr<const PackedWeights> packed = packed_weights(weights, units, pass.tiles.winograd);
  STD_TORCH_CHECK(packed, op, ": no memory for packed weights");
  for (size_t i = 0; i < weights.reduce.size(); ++i) {
    if (!weights.reduce[i]) continue;
    pass.sources[i].reduce = packed->reduce[i].get();
    pass.sources[i].reduce_floats = reduce_floats(*weights.reduce[i], units);
  }
  for (size_t i = 0; i < weights.expand.size(); ++i) pass.sources[i].expand = packed->expand[i].get();
  pass.core = packed->core.get();
  pass.u_out = packed->u_out.get();
  pass.in_bias = packed->in_bias.get();
  pass.bias = packed->bias.get();

  const int64_t planes = g.batch * pass.tiles.row_tiles * pass.tiles.col_tiles * g.out[0];
  Floats partial;
  if (stats) {
    pass.stats_channels = ceil_div(g.out_channels, 2 * units.lanes) * 2 * units.lanes;
    partial = allocate(planes * stats_floats(g, pass.stats_channels));
    STD_TORCH_CHECK(partial, op, ": no memory for statistics of ", planes, " planes");
    pass.stats = partial.get();
  }
  const int64_t taps = g.convolved ? g.kernel[0] * g.kernel[1] * g.kernel[2] : 0;
  const int64_t macs_per_voxel = g.rank_in * g.rank_out * taps +
                                 g.rank_out * g.out_channels + g.reduce_macs + g.source_macs;
  const int64_t grain = std::max<int64_t>(
      1, kMinMacsPerThread / std::max<int64_t>(1, macs_per_voxel * pass.tiles.rows * pass.tiles.cols));
  const int64_t scratch_size = scratch_of(g, pass.tiles, units).total;
  std::atomic<bool> out_of_memory{false};
  torch::stable::parallel_for(0, planes, grain, [&, run = run](int64_t begin, int64_t end) {
    const Floats scratch = allocate(scratch_size);
    if (scratch) {
      run(pass, begin, end, scratch.get());
    } else {
      out_of_memory = true;
    }
  });
  STD_TORCH_CHECK(!out_of_memory, op, ": no memory for ", scratch_size * 4, " bytes of scratch per thread");
  if (stats) merge_statistics(pass, *stats);
}

}  // namespace tucker_ops::cpu

extern "C" __attribute__((visibility("default"))) int tucker_ops_cpu_tiles(const int64_t* numbers, int64_t* result) {
  using namespace tucker_ops::cpu;
  tucker_ops::Geometry g{};
  int64_t* const scalars[] = {&g.batch, &g.in_channels, &g.rank_in, &g.rank_out, &g.out_channels};
  for (int64_t* scalar : scalars) *scalar = *numbers++;
  for (int64_t* triple : {g.in, g.out, g.kernel, g.stride, g.padding, g.dilation})
    for (int axis = 0; axis < 3; ++axis) triple[axis] = *numbers++;
  g.reduce_macs = g.rank_in * g.in_channels;
  const Kernels* kernels = select_kernels(std::getenv("TUCKER_CPU_ISA"));
  std::optional<int64_t> winograd;
  if (!kernels || !read_core(winograd)) return 0;
  const Units units = choose_run(*kernels, numbers[1] != 0).units;
  const Tiles tiles = tiles_of_call(g, {numbers[0] != 0, numbers[0] != 0}, units, winograd);
  result[0] = tiles.winograd;
  result[1] = tiles.rows;
  result[2] = tiles.cols;
  return 1;
}
