// The table that a file of one kind of numbers compiles, and that kernels.cpp chooses among.
#pragma once

#include "forms.cuh"

// A type with commas as one argument of a macro.
#define TUCKER_TYPE(...) __VA_ARGS__

#define TUCKER_KERNELS_OF(M, StreamForms, GatherForms)                                                                        \
  namespace {                                                                                                                 \
  using All = KernelsOf<M, StreamForms, GatherForms>;                                                                         \
  }                                                                                                                           \
  extern const KernelTable k##M##Kernels;                                                                                     \
  const KernelTable k##M##Kernels = {All::stream_forms, All::gather_forms, All::stream_shared_bytes, All::gather_shared_bytes, \
                                     All::start_stream, All::start_gather, All::start_pack,          All::start_covariance,    \
                                     All::start_merge};
