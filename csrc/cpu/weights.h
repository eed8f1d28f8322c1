// Weights in the order in which the kernels read them, kept from call to call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "one_pass.h"

namespace tucker_ops::cpu {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

// At least `count` floats, aligned to a cache line; null if there is no memory.
Floats allocate(int64_t count);

// A weight tensor in the user's layout: float32 or bfloat16.
struct WeightView {
  const void* data;
  bool is_float;
  std::vector<int64_t> sizes, strides;  // elements
};

struct Weights {
  // Per source [rows, C] or [positions, rows, C]; null where its values are the first stage's output.
  std::vector<std::optional<WeightView>> reduce;
  std::optional<WeightView> core, u_out, in_bias, bias;
  std::vector<std::optional<WeightView>> expand = {};  // per source [C, R] of one in rank space; may be shorter
};

struct PackedWeights {
  std::vector<Floats> reduce, expand;  // per source; null where it has none
  Floats core, u_out, in_bias, bias;  // core, u_out and in_bias are null where there is none
};

// Floats between the packed matrices of one source.
int64_t reduce_floats(const WeightView& matrix, const Units& units);

// The packed form for `units` and Winograd blocks of `winograd` (see OnePass); null if there is no memory. Pairs are
// packed from bfloat16 only.
//
// Forms are kept, and used again only where a copy of the original weights equals the ones given bit for bit: a
// change in place, however it was made, is never missed. Safe to call from several threads and after a fork.
std::shared_ptr<const PackedWeights> packed_weights(const Weights& weights, const Units& units, int64_t winograd);

}  // namespace tucker_ops::cpu
