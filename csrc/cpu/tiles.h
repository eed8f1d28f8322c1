// How the second stage of a problem is computed, and on which tiles.
#pragma once

#include <optional>

#include "one_pass.h"

namespace tucker_ops::cpu {

// Do the channels of a voxel lie together in the input and in the output?
struct Layouts {
  bool x_channels_last, y_channels_last;
};

// The tiles of least estimated work for `threads` that share them. `winograd` fixes the way of the second stage (see Tiles); nothing is returned
// where the problem does not allow it.
std::optional<Tiles> choose_tiles(const Geometry& g, const Layouts& layouts, const Units& u,
                                  std::optional<int64_t> winograd, int64_t threads);

}  // namespace tucker_ops::cpu
