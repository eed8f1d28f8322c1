#include "plan.h"

#include <algorithm>
#include <cstdlib>

namespace tucker_ops::cuda {
namespace {

constexpr int64_t kMostVoxels = INT32_MAX;  // of a plane, each way
constexpr int kReservedShared = 1024;   // bytes of a block that the system takes
constexpr double kLaunch = 3.0;         // microseconds from one small kernel to the next

// Shares of the matrix units' rate, guessed from bytes that shared memory and L1 deliver beside each mma.
constexpr double kStreamShare = 0.55, kGatherShare = 0.35;

// Cycles until a block's first plane: the table of its halo, and each of the core's weights.
constexpr double kStart = 2000, kPerWeight = 0.25;

// A block that has a multiprocessor to itself waits at its barriers and for its loads: what it takes, of two blocks' half.
constexpr double kAlone = 1.4;

// Dense 16-bit multiply-adds with mma.sync per cycle of a multiprocessor, bytes per cycle of device memory for each of
// them, and gigahertz: of a T4, A100, RTX 3090, RTX 4090 and H200, by their data sheets.
struct Rates {
  double macs, bytes, clock;
};

Rates rates_of(int capability) {
  if (capability < 80) return {512, 5.0, 1.59};
  if (capability < 86) return {1024, 10.2, 1.41};
  if (capability < 89) return {512, 6.7, 1.70};
  if (capability < 90) return {512, 3.1, 2.52};
  return {1270, 18.6, 1.75};
}

double macs_per_cycle(Kind kind, const Rates& rates) {
  switch (kind) {
    case Kind::kTf32: return rates.macs / 2;
    case Kind::kFp32: return rates.macs / 6;
    default: return rates.macs;
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Microseconds of blocks that each keep a multiprocessor's matrix units busy for `cycles`, some at a time, moving `bytes`.
double microseconds(const Rates& rates, const Device& device, int64_t blocks, int resident, double cycles, double bytes) {
  const int64_t waves = ceil_div(blocks, static_cast<int64_t>(device.multiprocessors) * resident);
  // A last wave of few blocks leaves each of them more of its multiprocessor.
  const int64_t rest = blocks - (waves - 1) * device.multiprocessors * resident;
  const auto together_on_one = [](int64_t count) { return count == 1 ? kAlone : static_cast<double>(count); };
  const double together = (waves - 1) * together_on_one(resident) + together_on_one(ceil_div(rest, device.multiprocessors));
  const double memory = bytes / (rates.bytes * device.multiprocessors);
  return std::max(together * cycles, memory) / (rates.clock * 1000);
}

}  // namespace

bool expands_in_gather(Kind kind, int rank_out) {
  for (const GatherForm& form : gather_forms(kind))
    if (form.expands && form.columns >= rank_out) return true;
  return false;
}

int choose_gather(Kind kind, const Device& device, int batch, int64_t voxels, int columns, int64_t depth, bool expands) {
  const Rates rates = rates_of(device.capability);
  const auto& forms = gather_forms(kind);
  int best = -1;
  double least = 0;
  for (int i = 0; i < static_cast<int>(forms.size()); ++i) {
    const GatherForm& form = forms[i];
    if (form.expands != expands || (expands && form.columns < columns)) continue;
    const int64_t blocks = batch * ceil_div(voxels, form.voxels) * (expands ? 1 : ceil_div(columns, form.columns));
    // What is read of L1 for each mma falls with the smaller side of a warp's own tile.
    const int rows = form.voxels / (form.warps / form.slices);
    const double share = kGatherShare * std::min(1.0, 0.5 + rows / 64.0) * (form.columns > 32 ? 1.0 : 0.8);
    const double cycles = static_cast<double>(form.voxels) * form.columns * depth / (macs_per_cycle(kind, rates) * share) + 500 * form.slices;
    const double time = microseconds(rates, device, blocks, form.warps > 4 ? 1 : 2, cycles, 0);
    if (best < 0 || time < least) best = i, least = time;
  }
  return best;
}

std::optional<StreamChoice> choose_stream(Kind kind, const Device& device, const Shape& shape, std::string& reason) {
  if (shape.obstacle) {
    reason = shape.obstacle;
    return std::nullopt;
  }
  const int step = step_of(kind);
  const auto across = [&](int a) { return shape.kernel[a] == 3 && shape.dilation[a] == 1; };
  if (!across(1) || !across(2) || shape.stride[1] != shape.stride[2] || shape.stride[1] > 2 || shape.dilation[0] != 1) {
    reason = "the one-pass kernel takes 3×3 in the plane, undilated, at stride 1 or 2";
    return std::nullopt;
  }
  if (std::max(shape.in[1] * shape.in[2], shape.out[1] * shape.out[2]) > kMostVoxels) {
    reason = "the one-pass kernel takes planes of at most 2^31 voxels";
    return std::nullopt;
  }
  if (*std::max_element(shape.factor.begin(), shape.factor.end()) > 2) {
    reason = "the one-pass kernel takes sources at half the extents, not less";
    return std::nullopt;
  }
  const Rates rates = rates_of(device.capability);
  std::optional<StreamChoice> best;
  reason = "no form of the one-pass kernel has these ranks, this kernel and stride";
  const auto& forms = stream_forms(kind);
  for (int i = 0; i < static_cast<int>(forms.size()); ++i) {
    const StreamForm& form = forms[i];
    if (form.steps_in * step < shape.rank_in || form.steps_out * step < shape.rank_out || form.depth != shape.kernel[0] ||
        form.stride_depth != shape.stride[0] || form.stride != shape.stride[1])
      continue;
    if (device.capability < form.least_capability) continue;
    const int shared = stream_shared_bytes(kind, i, shape.out_channels, shape.moments);
    if (shared > device.shared_per_block) {
      if (!best) reason = "a tile takes " + std::to_string(shared) + " bytes of shared memory, this card's blocks have " + std::to_string(device.shared_per_block);
      continue;
    }
    const int resident = std::min(form.blocks_per_multiprocessor, device.shared_per_multiprocessor / (shared + kReservedShared));
    const int64_t tiles = shape.batch * ceil_div(shape.out[1], form.height) * ceil_div(shape.out[2], form.width);
    const double weights = static_cast<double>(shape.rank_in) * shape.rank_out * form.depth * 9;
    const double halo = ((form.height - 1) * form.stride + 3.0) * ((form.width - 1) * form.stride + 3.0);
    const double rate = macs_per_cycle(kind, rates) * kStreamShare;
    const double reduce = halo * form.steps_in * step * shape.channels / rate;
    const double core = static_cast<double>(form.height) * form.width * 9 * form.steps_in * form.steps_out * step * step / rate;
    const double expand = static_cast<double>(form.height) * form.width * form.steps_out * step * shape.out_channels / rate;
    const double voxels_in = static_cast<double>(shape.in[0] * shape.in[1] * shape.in[2]), voxels_out = static_cast<double>(shape.out[0] * shape.out[1] * shape.out[2]);
    const double bytes = bytes_of(kind) * shape.batch * (voxels_in * shape.channels + voxels_out * shape.out_channels);
    // Any number of blocks along depth: the best is often one that just fills the card.
    for (int64_t pieces = 1; pieces <= shape.out[0]; ++pieces) {
      const int64_t chunk = ceil_div(shape.out[0], pieces);
      const double planes = static_cast<double>((chunk - 1) * form.stride_depth + form.depth);
      const double cycles = planes * (reduce + 600) + chunk * (form.depth * core + expand) + kStart + weights * kPerWeight;
      const int64_t blocks = tiles * ceil_div(shape.out[0], chunk);
      const double time = microseconds(rates, device, blocks, std::max(resident, 1), cycles, bytes) + kLaunch;
      if (!best || time < best->microseconds) best = StreamChoice{i, static_cast<int>(chunk), time};
    }
  }
  return best;
}

double stages_microseconds(Kind kind, const Device& device, const Shape& shape) {
  const Rates rates = rates_of(device.capability);
  const double rate = macs_per_cycle(kind, rates) * kGatherShare * device.multiprocessors;
  const double bytes = rates.bytes * device.multiprocessors / bytes_of(kind);
  const double in = static_cast<double>(shape.batch * shape.in[0] * shape.in[1] * shape.in[2]);
  const double out = static_cast<double>(shape.batch * shape.out[0] * shape.out[1] * shape.out[2]);
  const int taps = shape.kernel[0] * shape.kernel[1] * shape.kernel[2];
  const bool together = expands_in_gather(kind, shape.rank_out);
  const double reduce = std::max(in * shape.channels * shape.rank_in / rate, in * (shape.channels + shape.rank_in) / bytes);
  const double core = std::max(out * taps * shape.rank_in * shape.rank_out / rate, (in * shape.rank_in + out * (together ? shape.out_channels : shape.rank_out)) / bytes);
  const double expand_macs = out * shape.rank_out * shape.out_channels / rate;
  const double expand = together ? expand_macs : std::max(expand_macs, out * (shape.rank_out + shape.out_channels) / bytes);
  // Weights are packed beside the first stage.
  return (reduce + core + expand) / (rates.clock * 1000) + kLaunch * (together ? 4 : 6);
}

}  // namespace tucker_ops::cuda
