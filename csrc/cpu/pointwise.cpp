// tucker_ops::_pointwise_cpu and _pointwise_gradient_cpu: y = matrix · x + bias at every voxel, and the gradient of that.
//
// Voxels go through in blocks that stay in a core's cache, each read once for all that is made of it. Tensors may be
// channels-last, some of the channels of such a tensor (a part of a concatenation), or contiguous; contiguous blocks are
// turned on the way in and out. Sums are taken block by block in shares
// whose number depends on the problem alone: the result does not depend on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "pool.h"
#include "training.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace tucker_ops::cpu {
namespace {

// Floats of a block's tensors together, and voxels, of which fewer would read and write more sums than they add to.
constexpr int64_t kBlockFloats = 32 * 1024;
constexpr int64_t kFewestVoxels = 64, kMostVoxels = 1024;
constexpr int64_t kMostShares = 16;

// `step`: from a voxel's channels to the next's, if `last`.
struct Layout {
  int64_t items, channels, voxels, step;
  bool last;
};

// Strides of the axes, innermost first, if each covers those before it; `stride` is that of the first.
bool follows(const Tensor& x, const std::vector<int64_t>& axes, int64_t stride) {
  bool all = true;
  for (int64_t axis : axes) {
    all = all && (x.size(axis) == 1 || x.stride(axis) == stride);
    stride *= x.size(axis);
  }
  return all;
}

// From a voxel's channels to the next's, or 0 where voxels are not evenly spaced rows of channels.
int64_t step_of(const Tensor& x) {
  std::vector<int64_t> axes;
  for (int64_t axis = x.dim() - 1; axis >= 2; --axis) axes.push_back(axis);
  axes.push_back(0);
  const auto longer = std::find_if(axes.begin(), axes.end(), [&](int64_t axis) { return x.size(axis) > 1; });
  const int64_t step = longer == axes.end() ? x.size(1) : x.stride(*longer);
  const bool rows = x.size(1) == 1 || x.stride(1) == 1;
  return rows && step >= x.size(1) && follows(x, axes, step) ? step : 0;
}

bool in_rows_of_voxels(const Tensor& x) {
  std::vector<int64_t> axes;
  for (int64_t axis = x.dim() - 1; axis >= 0; --axis) axes.push_back(axis);
  return follows(x, axes, 1);
}

Layout layout_of(const char* op, const Tensor& x) {
  STD_TORCH_CHECK((x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16) && x.is_cpu() &&
                      (x.dim() == 4 || x.dim() == 5),
                  op, ": computes float32 and bfloat16 [N, C, *spatial] on the CPU");
  const int64_t step = step_of(x);
  Layout layout{x.size(0), x.size(1), 1, step, step > 0};
  STD_TORCH_CHECK(x.numel() == 0 || layout.last || in_rows_of_voxels(x), op, ": tensors must be contiguous or channels-last");
  for (int64_t axis = 2; axis < x.dim(); ++axis) layout.voxels *= x.size(axis);
  return layout;
}

std::vector<int64_t> size_with(const Tensor& x, int64_t channels) {
  std::vector<int64_t> size{x.size(0), channels};
  for (int64_t axis = 2; axis < x.dim(); ++axis) size.push_back(x.size(axis));
  return size;
}

// A small tensor's values in float32, rows of `columns` made `pitch` long with zeros.
std::vector<float> floats_of(const TrainingKernels& kernels, const char* op, const Tensor& given, int64_t rows,
                             int64_t columns, int64_t pitch, ScalarType dtype) {
  STD_TORCH_CHECK(given.scalar_type() == dtype && given.is_cpu() && given.is_contiguous() && given.numel() == rows * columns, op,
                  ": matrix [A, C] and bias [A] must be contiguous, of the input's dtype and fit to its channels");
  std::vector<float> values(rows * pitch, 0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    float* const to = values.data() + row * pitch;
    if (dtype == ScalarType::Float) {
      std::memcpy(to, static_cast<const float*>(given.const_data_ptr()) + row * columns, columns * sizeof(float));
    } else {
      kernels.widen(static_cast<const uint16_t*>(given.const_data_ptr()) + row * columns, columns, to);
    }
  }
  return values;
}

void convert(const TrainingKernels&, const float* from, int64_t count, float* to) { std::memcpy(to, from, count * sizeof(float)); }
void convert(const TrainingKernels& k, const uint16_t* from, int64_t count, float* to) { k.widen(from, count, to); }
void convert(const TrainingKernels& k, const float* from, int64_t count, uint16_t* to) { k.narrow(from, count, to); }

// Voxels × channels in float32, a voxel's channels side by side and `pitch` apart from the next's.
struct Block {
  const float* values;
  int64_t pitch;
};

// Turns rows × columns numbers, rows `step` apart, into columns × rows, `pitch` apart; a corner at a time, which caches like.
template <class T>
void turn(const T* from, int64_t step, int64_t rows, int64_t columns, T* to, int64_t pitch) {
  constexpr int64_t corner = 16;
  for (int64_t r = 0; r < rows; r += corner)
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t i = r; i < std::min(r + corner, rows); ++i) to[c * pitch + i] = from[i * step + c];
}

// One tensor's blocks, and the room in which they are made ready.
template <class T>
class Voxels {
 public:
  // `pitch`: at least the channels, and zeros behind them.
  Voxels(const TrainingKernels& kernels, const Layout& layout, int64_t pitch, int64_t most)
      : kernels_(kernels), layout_(layout), pitch_(pitch) {
    if (!direct()) room_.assign(most * pitch, 0.0f);
    if (!layout.last && !std::is_same_v<T, float>) turned_.resize(most * pitch);
  }

  Block read(const T* base, int64_t item, int64_t first, int64_t count) {
    const int64_t channels = layout_.channels;
    if (layout_.last) {
      const T* const from = base + (item * layout_.voxels + first) * layout_.step;
      if constexpr (std::is_same_v<T, float>) {
        if (direct()) return {from, layout_.step};
      }
      rows(from, layout_.step, room_.data(), pitch_, count);
    } else {
      const T* const from = base + item * channels * layout_.voxels + first;
      if constexpr (std::is_same_v<T, float>) {
        turn(from, layout_.voxels, channels, count, room_.data(), pitch_);
      } else {
        turn(from, layout_.voxels, channels, count, turned_.data(), pitch_);
        kernels_.widen(turned_.data(), count * pitch_, room_.data());
      }
    }
    return {room_.data(), pitch_};
  }

  // Where a block's values are to be written before `write`.
  float* room(T* base, int64_t item, int64_t first) {
    if constexpr (std::is_same_v<T, float>) {
      if (direct()) return base + (item * layout_.voxels + first) * layout_.channels;
    }
    return room_.data();
  }

  void write(T* base, int64_t item, int64_t first, int64_t count) {
    if (direct()) return;
    const int64_t channels = layout_.channels;
    if (layout_.last) {
      T* const to = base + (item * layout_.voxels + first) * channels;
      rows(room_.data(), pitch_, to, channels, count);
    } else {
      T* const to = base + item * channels * layout_.voxels + first;
      if constexpr (std::is_same_v<T, float>) {
        turn(room_.data(), pitch_, count, channels, to, layout_.voxels);
      } else {
        kernels_.narrow(room_.data(), count * pitch_, turned_.data());
        turn(turned_.data(), pitch_, count, channels, to, layout_.voxels);
      }
    }
  }

 private:
  template <class From, class To>
  void rows(const From* from, int64_t from_pitch, To* to, int64_t to_pitch, int64_t count) {
    if (from_pitch == to_pitch && from_pitch == layout_.channels) return convert(kernels_, from, count * from_pitch, to);
    for (int64_t v = 0; v < count; ++v) convert(kernels_, from + v * from_pitch, layout_.channels, to + v * to_pitch);
  }

  bool direct() const { return std::is_same_v<T, float> && layout_.last && pitch_ == layout_.channels; }

  const TrainingKernels& kernels_;
  Layout layout_;
  int64_t pitch_;
  std::vector<float> room_;
  std::vector<T> turned_;
};

int64_t padded(const TrainingKernels& kernels, int64_t channels) {
  return (channels + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
}

std::vector<int64_t> columns_of(const TrainingKernels& kernels, int64_t pitch) {
  std::vector<int64_t> columns(pitch / kernels.lanes);
  for (size_t i = 0; i < columns.size(); ++i) columns[i] = static_cast<int64_t>(i) * kernels.lanes;
  return columns;
}

// How a tensor's voxels are cut: blocks of all items in order.
struct Cut {
  int64_t most, per_item, blocks;

  Cut(const Layout& layout, int64_t floats_per_voxel)
      : most(std::clamp(kBlockFloats / std::max<int64_t>(1, floats_per_voxel) / 16 * 16, kFewestVoxels, kMostVoxels)),
        per_item((layout.voxels + most - 1) / most),
        blocks(layout.items * per_item) {}

  // Runs body(item, first voxel, voxels) for blocks begin to end.
  template <class Body>
  void each(const Layout& layout, int64_t begin, int64_t end, const Body& body) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % per_item * most;
      body(i / per_item, first, std::min(most, layout.voxels - first));
    }
  }
};

// values [voxels, columns of right] = left [voxels, depth] · right [depth, pitch].
void multiply(const TrainingKernels& kernels, const Block& left, int64_t voxels, int64_t depth, const float* right,
              const std::vector<int64_t>& columns, int64_t pitch, bool add, float* values) {
  kernels.products({left.values, 1, left.pitch, voxels, right, pitch, columns.data(), static_cast<int64_t>(columns.size()), depth,
                    values, pitch, add});
}

template <class T>
Tensor pointwise(const char* op, const Tensor& x, const Tensor& matrix, const std::optional<Tensor>& bias) {
  const TrainingKernels& kernels = training_kernels();
  const Layout in = layout_of(op, x);
  STD_TORCH_CHECK(matrix.dim() == 2, op, ": matrix must be [A, C]");
  const int64_t rows = matrix.size(0), pitch = padded(kernels, rows);
  // [C, A]: every voxel adds up rows of it.
  const std::vector<float> given = floats_of(kernels, op, matrix, rows, in.channels, in.channels, x.scalar_type());
  std::vector<float> right(in.channels * pitch, 0.0f), start;
  turn(given.data(), in.channels, rows, in.channels, right.data(), pitch);
  if (bias) start = floats_of(kernels, op, *bias, 1, rows, pitch, x.scalar_type());
  Tensor y = pooled_empty(size_with(x, rows), x.scalar_type(), true);
  if (y.numel() == 0) return y;
  const auto* const from = static_cast<const T*>(x.const_data_ptr());
  auto* const to = static_cast<T*>(y.mutable_data_ptr());
  const Layout out{in.items, rows, in.voxels, rows, true};
  const Cut cut(in, in.channels + pitch);
  const std::vector<int64_t> columns = columns_of(kernels, pitch);
  torch::stable::parallel_for(0, cut.blocks, 1, [&](int64_t begin, int64_t end) {
    Voxels<T> reader(kernels, in, in.channels, cut.most), writer(kernels, out, pitch, cut.most);
    cut.each(in, begin, end, [&](int64_t item, int64_t first, int64_t count) {
      const Block block = reader.read(from, item, first, count);
      float* const values = writer.room(to, item, first);
      if (bias)
        for (int64_t v = 0; v < count; ++v) std::memcpy(values + v * pitch, start.data(), pitch * sizeof(float));
      multiply(kernels, block, count, in.channels, right.data(), columns, pitch, bias.has_value(), values);
      writer.write(to, item, first, count);
    });
  });
  return y;
}

template <class T>
Tensor small(const Tensor& like, const std::vector<int64_t>& size, const TrainingKernels& kernels, const float* values, int64_t rows,
             int64_t columns, int64_t pitch) {
  Tensor result = torch::stable::new_empty(like, size);
  auto* const to = static_cast<T*>(result.mutable_data_ptr());
  for (int64_t row = 0; row < rows; ++row) convert(kernels, values + row * pitch, columns, to + row * columns);
  return result;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> gradient(const char* op, const Tensor& grad, const Tensor& x, const Tensor& matrix, bool need_x,
                                            bool need_matrix, bool need_bias) {
  const TrainingKernels& kernels = training_kernels();
  const Layout in = layout_of(op, x), out = layout_of(op, grad);
  STD_TORCH_CHECK(in.items == out.items && in.voxels == out.voxels && grad.scalar_type() == x.scalar_type(), op,
                  ": grad must be of the input's dtype and extents");
  const int64_t rows = out.channels, pitch = padded(kernels, in.channels);
  const std::vector<float> right = floats_of(kernels, op, matrix, rows, in.channels, pitch, x.scalar_type());
  const std::vector<int64_t> columns = columns_of(kernels, pitch);
  Tensor grad_x = need_x ? pooled_empty(size_with(x, in.channels), x.scalar_type(), in.last) : torch::stable::new_empty(x, {0});
  const auto* const g = static_cast<const T*>(grad.const_data_ptr());
  const auto* const from = static_cast<const T*>(x.const_data_ptr());
  T* const to = need_x ? static_cast<T*>(grad_x.mutable_data_ptr()) : nullptr;
  const Cut cut(in, rows + 2 * pitch);
  const int64_t shares = std::max<int64_t>(1, std::min(kMostShares, cut.blocks)), weights = rows * pitch;
  std::vector<float> sums(shares * weights, 0.0f), biases(shares * rows, 0.0f);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    Voxels<T> of_grad(kernels, out, rows, cut.most), of_x(kernels, in, pitch, cut.most), writer(kernels, in, pitch, cut.most);
    std::vector<float> block_sums(weights);
    for (int64_t share = begin; share < end; ++share) {
      float *const share_sums = sums.data() + share * weights, *const share_biases = biases.data() + share * rows;
      cut.each(in, share * cut.blocks / shares, (share + 1) * cut.blocks / shares, [&](int64_t item, int64_t first, int64_t count) {
        const Block above = of_grad.read(g, item, first, count);
        if (need_x) {
          multiply(kernels, above, count, rows, right.data(), columns, pitch, false, writer.room(to, item, first));
          writer.write(to, item, first, count);
        }
        if (need_matrix) {
          const Block below = of_x.read(from, item, first, count);
          kernels.products({above.values, above.pitch, 1, rows, below.values, below.pitch, columns.data(),
                            static_cast<int64_t>(columns.size()), count, block_sums.data(), pitch, false});
          kernels.add_rows(block_sums.data(), weights, weights, 1, share_sums);
        }
        if (need_bias) kernels.add_rows(above.values, above.pitch, rows, count, share_biases);
      });
    }
  });
  if (shares > 1) {
    kernels.add_rows(sums.data() + weights, weights, weights, shares - 1, sums.data());
    kernels.add_rows(biases.data() + rows, rows, rows, shares - 1, biases.data());
  }
  Tensor grad_matrix = need_matrix ? small<T>(x, {rows, in.channels}, kernels, sums.data(), rows, in.channels, pitch)
                                   : torch::stable::new_empty(x, {0});
  Tensor grad_bias =
      need_bias ? small<T>(x, {rows}, kernels, biases.data(), 1, rows, rows) : torch::stable::new_empty(x, {0});
  return {grad_x, grad_matrix, grad_bias};
}

Tensor pointwise_any(Tensor x, Tensor matrix, std::optional<Tensor> bias) {
  constexpr const char* op = "tucker_ops::_pointwise_cpu";
  return x.scalar_type() == ScalarType::Float ? pointwise<float>(op, x, matrix, bias) : pointwise<uint16_t>(op, x, matrix, bias);
}

std::tuple<Tensor, Tensor, Tensor> gradient_any(Tensor grad, Tensor x, Tensor matrix, bool need_x, bool need_matrix, bool need_bias) {
  constexpr const char* op = "tucker_ops::_pointwise_gradient_cpu";
  return x.scalar_type() == ScalarType::Float ? gradient<float>(op, grad, x, matrix, need_x, need_matrix, need_bias)
                                              : gradient<uint16_t>(op, grad, x, matrix, need_x, need_matrix, need_bias);
}

}  // namespace
}  // namespace tucker_ops::cpu

STABLE_TORCH_LIBRARY_IMPL(tucker_ops, CPU, m) {
  m.impl("_pointwise_cpu", TORCH_BOX(&tucker_ops::cpu::pointwise_any));
  m.impl("_pointwise_gradient_cpu", TORCH_BOX(&tucker_ops::cpu::gradient_any));
}
