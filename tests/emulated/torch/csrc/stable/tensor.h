// What csrc/cpu uses of torch, so that the kernels link into a static program. Weights come as views, so tensors are empty.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace torch::headeronly {
enum class ScalarType { Float, BFloat16 };
}

namespace torch::stable {
struct Tensor {
  const void* const_data_ptr() const { return nullptr; }
  headeronly::ScalarType scalar_type() const { return headeronly::ScalarType::Float; }
  int64_t dim() const { return 0; }
  int64_t size(int64_t) const { return 0; }
  int64_t stride(int64_t) const { return 0; }
};

template <class... Words>
void check(bool holds, const char* condition, const Words&...) {
  if (!holds) throw std::runtime_error(condition);
}
}  // namespace torch::stable

#define STD_TORCH_CHECK(condition, ...) torch::stable::check(static_cast<bool>(condition), #condition, __VA_ARGS__)
