// Which kernels compute a convolution, from a model of what they cost on a device. No CUDA and no torch here.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "kernels.h"

namespace tucker_ops::cuda {

// What the choice depends on; torch tells it of its devices.
struct Device {
  int capability;  // 75, 80, 86, 89, 90, …
  int multiprocessors;
  int shared_per_block, shared_per_multiprocessor;  // bytes
};

// A convolution between a first and a third stage.
struct Shape {
  int batch, channels, rank_in, rank_out, out_channels;  // channels: of all sources together
  std::array<int64_t, 3> in, out;
  std::array<int, 3> kernel, stride, padding, dilation;
  std::array<int, 3> factor;  // of coarse sources
  bool moments;
  // What else the one-pass kernel asks for, as the caller knows it: aligned rows, sources that are summed, a third stage.
  const char* obstacle;
};

struct StreamChoice {
  int form, chunk;
  double microseconds;
};

// The best form of the one-pass kernel, or in `reason` why none runs it.
std::optional<StreamChoice> choose_stream(Kind kind, const Device& device, const Shape& shape, std::string& reason);

// The form of the gather kernel for a product of `voxels` rows a volume, `columns` columns and `depth` channels summed up.
int choose_gather(Kind kind, const Device& device, int batch, int64_t voxels, int columns, int64_t depth, bool expands);
// Can the third stage follow in the same launch?
bool expands_in_gather(Kind kind, int rank_out);

// Of the stages one launch after the other.
double stages_microseconds(Kind kind, const Device& device, const Shape& shape);

}  // namespace tucker_ops::cuda
