// Kernels that know no kind of numbers.
#include <cstdio>

#include "kernels.h"
#include "launch.cuh"
#include "small.cuh"

namespace tucker_ops::cuda {

std::string start_merge_moments(const MergeMomentsParams& p, int batch, void* stream) {
  return start<MergeMoments>(p, {(p.channels + 31) / 32, batch, p.splits}, MergeMoments::kShared, stream);
}

std::string start_norm_affine(const NormParams& p, void* stream) {
  return start<NormAffine>(p, {(p.total + NormAffine::kThreads - 1) / NormAffine::kThreads}, 0, stream);
}

}  // namespace tucker_ops::cuda

#if defined(__CUDACC__)
// Can these kernels run on device `index`? Returns the compute capability that their code for it was compiled for, which
// may be older than the device's, or -1, and then text says why not. Leaves the current device as it was.
extern "C" __attribute__((visibility("default"))) int tucker_ops_cuda_probe(int index, char* text, int64_t size) {
  int current = 0;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(index);
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, tucker_ops::cuda::entry<tucker_ops::cuda::NormAffine>);
    cudaSetDevice(current);
  }
  if (error == cudaSuccess) return attributes.ptxVersion;
  cudaGetLastError();
  std::snprintf(text, size, "%s", cudaGetErrorString(error));
  return -1;
}
#endif
