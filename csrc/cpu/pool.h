// Large buffers that the results of ops take turns with.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace tucker_ops::cpu {

// An uninitialised tensor [N, C, *spatial], channels-last or contiguous. From 4 MB on its memory comes from the pool, and
// goes back there with the tensor: to fault in a fresh buffer takes as long as a good part of what is computed into it.
//
// At most TUCKER_CPU_POOL_MB of idle buffers (1024; 0 turns the pool off) are kept. A quarter of that, those given back
// last, stays as it is; the rest is handed to the system as free to take (MADV_FREE), and costs nothing that another
// process or tensor needs.
torch::stable::Tensor pooled_empty(const std::vector<int64_t>& size, torch::headeronly::ScalarType dtype,
                                   bool channels_last);

}  // namespace tucker_ops::cpu

extern "C" {
// Bytes of idle buffers.
__attribute__((visibility("default"))) int64_t tucker_ops_cpu_pool_bytes();
}
