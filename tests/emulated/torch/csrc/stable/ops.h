// One thread after the other: threads decide only on tiles, and on which units share scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tensor.h"

namespace torch::stable {
inline int64_t threads = 1;

inline int64_t get_num_threads() { return threads; }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t parts = std::clamp((end - begin) / grain, int64_t{1}, threads);
  const int64_t size = (end - begin + parts - 1) / parts;
  for (int64_t at = begin; at < end; at += size) f(at, std::min(end, at + size));
}
}  // namespace torch::stable
