// Starts a kernel on a stream, or on the emulated multiprocessor.
#pragma once

#include <cstdint>
#include <string>

#include "device.cuh"

namespace tucker_ops::cuda {

struct GridSize {
  int64_t x, y = 1, z = 1;
};

#if defined(__CUDACC__)
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocks) entry(const __grid_constant__ typename Kernel::Params p) {
  Kernel::run(p);
}

// Nothing, or what the runtime said.
template <class Kernel>
std::string start(const typename Kernel::Params& p, const GridSize& grid, int shared_bytes, void* stream) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) {
      // Else the next launch would be blamed for it.
      cudaGetLastError();
      return cudaGetErrorString(error);
    }
  }
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  entry<Kernel><<<blocks, Kernel::kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
#else
template <class Kernel>
std::string start(const typename Kernel::Params& p, const GridSize& grid, int shared_bytes, void*) {
  return emulation::run({static_cast<int>(grid.x), static_cast<int>(grid.y), static_cast<int>(grid.z)}, Kernel::kThreads, shared_bytes,
                        [&] { Kernel::run(p); });
}
#endif

}  // namespace tucker_ops::cuda
