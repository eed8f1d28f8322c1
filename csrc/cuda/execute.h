// From tensors to launches: what the ops of this backend have in common.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "plan.h"

namespace tucker_ops::cuda {

// Of one call, checked by its op. Tensors are dense: activations channels-last, weights contiguous.
struct Call {
  const char* op;
  std::vector<torch::stable::Tensor> sources;
  std::vector<std::optional<torch::stable::Tensor>> expand, scale, shift, reduce;
  std::vector<double> slope;
  std::optional<torch::stable::Tensor> in_bias, u_out, bias;
  const torch::stable::Tensor* core;
  std::vector<int64_t> stride, padding, dilation;
  std::string stats;
  bool contiguous, float32_values;  // values channel after channel; in float32
  std::vector<int64_t> device;  // capability, multiprocessors, shared memory of a block and of a multiprocessor
  // Empty: the model decides. Else whether TF32 will do, 0 or 1; and after it -1, or 0 for the stages one by one, or 1 for
  // the one-pass kernel or an error, or 2 for it where it can; and after that its form and chunk.
  std::vector<int64_t> choice;
};

struct Result {
  torch::stable::Tensor values, mean, m2;
};

Result execute(const Call& call);

// The stream that torch's caller is on, and the device made current for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& tensor);
  ~OnDevice();
  void* stream() const { return stream_; }

 private:
  void* guard_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace tucker_ops::cuda
