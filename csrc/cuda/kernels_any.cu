// Kernels that know no kind of numbers.
#include "kernels.h"
#include "launch.cuh"
#include "small.cuh"

namespace tucker_ops::cuda {

std::string start_merge_moments(const MergeMomentsParams& p, int batch, void* stream) {
  return start<MergeMoments>(p, {(p.channels + 31) / 32, batch}, MergeMoments::kShared, stream);
}

std::string start_norm_affine(const NormParams& p, void* stream) {
  return start<NormAffine>(p, {(p.total + NormAffine::kThreads - 1) / NormAffine::kThreads}, 0, stream);
}

}  // namespace tucker_ops::cuda
