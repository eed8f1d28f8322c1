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
}
