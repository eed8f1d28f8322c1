// What this machine can do at most: arithmetic in registers, and a copy through memory.
#pragma once

#include <cstddef>
#include <vector>

#include "fma.h"

namespace tucker_ops::bench {

// The loops that this processor can run, best first.
std::vector<const FmaLoop*> fma_loops();

// GFLOP/s of `loop` on `threads` threads together, over `seconds`.
double peak(const FmaLoop& loop, int threads, double seconds);

// GB/s, read and written together, of `threads` threads that copy `bytes` bytes over and over for `seconds`.
double copy(int threads, std::size_t bytes, double seconds);

}  // namespace tucker_ops::bench
