#include "tiles.h"

#include <unistd.h>

#include <algorithm>
#include <limits>

namespace tucker_ops::cpu {
namespace {

// What a tile keeps should stay in a core's L2 cache; weights and input stream through the rest.
constexpr double kTileShare = 0.8;
constexpr int64_t kSmallestCache = 512 * 1024;
constexpr int64_t kLargestOverflow = 16;
// Sums that must be under way at a time to hide the latency of a multiply-add: 4 cycles, 2 a cycle.
constexpr double kSumsInFlight = 8;

// Measured, in multiply-adds of one core: a run of adjacent memory costs this much to find, be its row of a tile
// one run of all channels or one of each channel. Small tensors are in the cache already.
constexpr double kRunOfVoxels = 20'000, kRunOfOneChannel = 1'300;
constexpr double kRunInCache = 0.25;
constexpr int64_t kInCacheBytes = 8 * 1024 * 1024;

int64_t tile_bytes() {
  static const int64_t bytes = [] {
    int64_t cache = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return static_cast<int64_t>(kTileShare * std::max(cache, kSmallestCache));
  }();
  return bytes;
}

bool allows_winograd(const Geometry& g) {
  for (int axis : {1, 2})
    if (g.kernel[axis] != 3 || g.stride[axis] != 1 || g.dilation[axis] != 1) return false;
  return true;
}

int64_t reach(const Geometry& g, int axis, int64_t extent) {
  return (extent - 1) * g.stride[axis] + (g.kernel[axis] - 1) * g.dilation[axis] + 1;
}

Tiles tile_of(const Geometry& g, int64_t winograd, int64_t rows, int64_t cols) {
  Tiles t;
  t.winograd = winograd;
  t.rows = rows;
  t.cols = cols;
  t.rows_in = winograd ? ceil_div(rows, winograd) * winograd + 2 : reach(g, 1, rows);
  t.cols_in = winograd ? ceil_div(cols, winograd) * winograd + 2 : reach(g, 2, cols);
  t.slots = std::min((g.kernel[0] - 1) * g.dilation[0] + 1, std::max<int64_t>(g.in[0], 1));
  t.row_tiles = ceil_div(g.out[1], rows);
  t.col_tiles = ceil_div(g.out[2], cols);
  return t;
}

int64_t bytes_of(const Geometry& g, const Tiles& t, const Units& u) {
  return scratch_of(g, t, u).line * static_cast<int64_t>(sizeof(float));
}

// Share of the peak that blocks of voxels reach, `count` voxels in all; see voxel_blocks.
double block_efficiency(int64_t count, int64_t channels, int64_t lanes) {
  const int64_t vectors = channels > lanes ? 2 : 1;
  const int64_t full = lanes == 16 || vectors == 1 ? 12 : 6;
  const double size = static_cast<double>(count) / ceil_div(count, full);
  return std::min(1.0, size * vectors / kSumsInFlight);
}

// Work of a tile per output voxel, in multiply-adds: with what the halo adds to the first stage, Winograd's
// transforms, blocks that reach over the edge or leave units idle, and a surcharge for tiles that leave the cache.
// Input outside the volume costs nothing, and rows that no output reads are skipped.
double work_per_voxel(const Geometry& g, const Layouts& layouts, const Tiles& t, const Units& u) {
  const int64_t lanes = u.lanes;
  const double voxels = static_cast<double>(t.rows) * t.cols;
  const double rows_read = std::min({t.rows_in, t.rows * g.kernel[1], g.in[1]});
  const double cols_read = std::min(t.cols_in, g.in[2]);
  const double in_ranks = ceil_div(g.rank_in, lanes) * lanes, out_ranks = ceil_div(g.rank_out, lanes) * lanes;
  const double read = rows_read * cols_read * g.stride[0] / voxels / u.channels;
  const double reduce = read * (g.reduce_macs * in_ranks / g.rank_in + g.source_macs);
  const double expand = !g.expanded ? 0 : static_cast<double>(ceil_div(g.out_channels, lanes) * lanes) * g.rank_out / u.channels;
  double core = 0;
  if (t.winograd) {
    const int64_t m = t.winograd, blocks = ceil_div(t.rows, m) * ceil_div(t.cols, m), points = (m + 2) * (m + 2);
    const double products = static_cast<double>(points * g.kernel[0]) * g.rank_in * out_ranks;
    // Measured: a transform costs what 14 multiply-adds per voxel and rank do.
    core = blocks * (products / block_efficiency(blocks, g.rank_out, lanes) + 14 * m * m * (in_ranks + out_ranks)) /
           voxels;
  } else if (g.convolved) {
    const double taps = static_cast<double>(g.kernel[0]) * g.kernel[1] * g.kernel[2];
    core = taps * g.rank_in * out_ranks / block_efficiency(t.cols, g.rank_out, lanes) / u.core;
  }
  auto run = [](bool channels_last, int64_t channels) {
    return channels_last ? kRunOfVoxels : kRunOfOneChannel * channels;
  };
  const int64_t in = g.in[0] * g.in[1] * g.in[2] * g.in_channels, out = g.out[0] * g.out[1] * g.out[2] * g.out_channels;
  const double memory = (rows_read * g.stride[0] * run(layouts.x_channels_last, g.in_channels) +
                         t.rows * run(layouts.y_channels_last, g.out_channels)) /
                        voxels * (4 * (in + out) > kInCacheBytes ? 1.0 : kRunInCache);
  const int64_t bytes = bytes_of(g, t, u);
  const double surcharge = bytes <= tile_bytes() ? 1.0 : bytes <= 4 * tile_bytes() ? 1.2 : 1.5;
  return (reduce + core + expand) * surcharge + memory;
}

struct Choice {
  std::optional<Tiles> tiles;
  double work = std::numeric_limits<double>::infinity();
};

// The best tiles for one way of the second stage, where `threads` share them out.
Choice best_tiles(const Geometry& g, const Layouts& layouts, const Units& u, int64_t m, int64_t threads) {
  const int64_t unit = std::max<int64_t>(m, 1);
  Choice best;
  auto consider = [&](int64_t rows, int64_t cols) {
    const Tiles candidate = tile_of(g, m, rows, cols);
    const int64_t units = g.batch * candidate.row_tiles * candidate.col_tiles * g.out[0];
    const double idle = static_cast<double>(ceil_div(units, threads) * threads) / units;
    const double work = work_per_voxel(g, layouts, candidate, u) * idle;
    if (work < best.work) best = {candidate, work};
  };
  // Among the largest tiles that fit each of a few limits, and those half as high; a wide dilation makes halos that
  // are worth a larger tile than the cache holds.
  for (int64_t limit = tile_bytes(); limit <= kLargestOverflow * tile_bytes(); limit *= 4) {
    for (int64_t cols = g.out[2];; cols = ceil_div(ceil_div(cols, 2), unit) * unit) {
      // Bytes grow about linearly with rows, so the most that fit follow from two sizes.
      const int64_t one = bytes_of(g, tile_of(g, m, unit, cols), u);
      const int64_t step = std::max<int64_t>(1, bytes_of(g, tile_of(g, m, 2 * unit, cols), u) - one);
      if (one <= limit) {
        const int64_t units = ceil_div(g.out[1], unit), most = std::min(units, 1 + (limit - one) / step);
        for (int64_t tiles : {ceil_div(units, most), 2 * ceil_div(units, most)})
          consider(std::min(g.out[1], ceil_div(units, tiles) * unit), cols);
      }
      if (cols <= unit) break;
    }
  }
  if (!best.tiles) consider(std::min(unit, g.out[1]), std::min(unit, g.out[2]));
  return best;
}

}  // namespace

std::optional<Tiles> choose_tiles(const Geometry& g, const Layouts& layouts, const Units& u,
                                  std::optional<int64_t> winograd, int64_t threads) {
  // Not by the number of threads: the way of the second stage decides how results are rounded.
  std::optional<int64_t> way;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t m : {0, 2, 4}) {
    if ((winograd && *winograd != m) || (m && !allows_winograd(g))) continue;
    const double work = best_tiles(g, layouts, u, m, 1).work;
    if (work < least) {
      least = work;
      way = m;
    }
  }
  if (!way) return std::nullopt;
  return best_tiles(g, layouts, u, *way, threads).tiles;
}

}  // namespace tucker_ops::cpu
