// Which compiled kernels this processor can run, and which of them runs.
#pragma once

#include "one_pass.h"

namespace tucker_ops::cpu {

// The kernels for `name`, or the best of this processor if name is null or empty; null if it is not to be had.
const Kernels* select_kernels(const char* name);

}  // namespace tucker_ops::cpu

extern "C" {
// Names of the kernels this processor can run, best first, separated by commas.
__attribute__((visibility("default"))) const char* tucker_ops_cpu_isas();

// How a call would be computed. numbers: batch, C_in, R_in, R_out, C_out; per axis in, out, kernel, stride, padding,
// dilation (depth 1 in 2D); 1 if channels-last; 1 if bfloat16. result: Winograd's m or 0, rows and columns of a tile. Returns 0, and
// writes nothing, where TUCKER_CPU_ISA cannot run or TUCKER_CPU_CORE is not known.
__attribute__((visibility("default"))) int tucker_ops_cpu_tiles(const int64_t* numbers, int64_t* result);
}
