// Which kernels there are, and how to start one. No CUDA and no torch here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "params.h"

namespace tucker_ops::cuda {

enum class Kind { kFp16, kBf16, kTf32, kFp32 };

inline int bytes_of(Kind kind) { return kind == Kind::kFp16 || kind == Kind::kBf16 ? 2 : 4; }
inline int step_of(Kind kind) { return 32 / bytes_of(kind); }
inline int group_of(Kind kind) { return 64 / bytes_of(kind); }
inline int chunk_of(Kind kind) { return 16 / bytes_of(kind); }

// One compiled form of the one-pass kernel.
struct StreamForm {
  int steps_in, steps_out;              // ranks in steps
  int depth, stride_depth, stride;      // of the kernel and in the plane
  int height, width;                    // of a block's tile of outputs
  int least_capability;
  int slots, blocks_per_multiprocessor;
};

// One compiled form of the gather kernel.
struct GatherForm {
  int voxels, columns;  // of a block
  int warps, slices;
  bool expands;
};

const std::vector<StreamForm>& stream_forms(Kind kind);
const std::vector<GatherForm>& gather_forms(Kind kind);
int stream_shared_bytes(Kind kind, int form, int channels, bool moments);
int gather_shared_bytes(Kind kind, int form, int channels, bool moments);

// Each returns nothing, or what the runtime said.
std::string start_stream(Kind kind, int form, const StreamParams& p, int batch, void* stream);
std::string start_gather(Kind kind, int form, const GatherParams& p, int batch, void* stream);
std::string start_pack(Kind kind, const PackParams& p, int jobs, void* stream);
std::string start_covariance(Kind kind, const CovarianceParams& p, int batch, void* stream);
std::string start_merge(Kind kind, const MergeParams& p, void* stream);
std::string start_norm_affine(const NormParams& p, void* stream);
std::string start_merge_moments(const MergeMomentsParams& p, int batch, void* stream);

// What a file of one kind of numbers compiles; the functions above choose among four such tables.
struct KernelTable {
  std::vector<StreamForm> (*stream_forms)();
  std::vector<GatherForm> (*gather_forms)();
  int (*stream_shared_bytes)(int form, int channels, bool moments);
  int (*gather_shared_bytes)(int form, int channels, bool moments);
  std::string (*start_stream)(int form, const StreamParams& p, int batch, void* stream);
  std::string (*start_gather)(int form, const GatherParams& p, int batch, void* stream);
  std::string (*start_pack)(PackParams p, int jobs, void* stream);
  std::string (*start_covariance)(const CovarianceParams& p, int batch, void* stream);
  std::string (*start_merge)(MergeParams p, void* stream);
};

// Blocks along the grid's x: what moments are counted by.
inline int64_t stream_blocks(const StreamParams& p) { return static_cast<int64_t>(p.tiles[0]) * p.tiles[1] * p.tiles[2]; }
inline int64_t gather_blocks(const GatherParams& p, const GatherForm& form) {
  int64_t voxels = 1, classes = 1;
  for (int a = 0; a < 3; ++a) voxels *= p.out[a] / p.factor[a], classes *= p.factor[a];
  return classes * ((voxels + form.voxels - 1) / form.voxels);
}

}  // namespace tucker_ops::cuda
