#include "execute.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#if defined(TUCKER_EMULATED_GPU)
#include "emulation.h"
#else
// Absent from a torch without CUDA, on which this library loads as well.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace tucker_ops::cuda {

OnDevice::OnDevice(const Tensor& tensor) {
#if !defined(TUCKER_EMULATED_GPU)
  // What may throw comes before the guard, which only a whole object takes back.
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "tucker_ops: this torch has no CUDA");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  DeviceGuardHandle guard = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(tensor.get_device_index(), &guard));
  guard_ = guard;
#else
  (void)tensor;
#endif
}

OnDevice::~OnDevice() {
#if !defined(TUCKER_EMULATED_GPU)
  aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(guard_));
#else
  emulation::forget();
#endif
}

namespace {

constexpr int64_t kMergedTogether = 64, kMostSplits = 256;
constexpr int64_t kMostTaps = 1024;  // times channels, in a table of 16 KB

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

using Extents = std::array<int, 3>;

// Channels-last values as kernels see them.
struct Values {
  Tensor tensor;
  int channels, spacing;  // elements between voxels
  Extents extent;
};

// A weight for the gather kernel, [taps or classes, rows rounded up, pitch].
struct Packed {
  Tensor weight;
  int pitch;
  bool taps_within;  // rows are [channel][tap]
};

class Execution {
 public:
  explicit Execution(const Call& call)
      : call_(call), on_(call.sources[0]), ndim_(call.core->dim() - 2), batch_(static_cast<int>(call.sources[0].size(0))) {
    const ScalarType dtype = call.core->scalar_type();
    const bool tf32 = !call.choice.empty() && call.choice[0] != 0;
    kind_ = dtype == ScalarType::Half ? Kind::kFp16 : dtype == ScalarType::BFloat16 ? Kind::kBf16 : tf32 ? Kind::kTf32 : Kind::kFp32;
    STD_TORCH_CHECK(call.device.size() == 4, call.op, ": device must be capability, multiprocessors and bytes of shared memory of a block and "
                                                      "of a multiprocessor");
    device_ = {static_cast<int>(call.device[0]), static_cast<int>(call.device[1]), static_cast<int>(call.device[2]), static_cast<int>(call.device[3])};
    rank_in_ = static_cast<int>(call.core->size(1));
    rank_out_ = static_cast<int>(call.core->size(0));
    out_channels_ = call.u_out ? static_cast<int>(call.u_out->size(0)) : rank_out_;
    kernel_ = stride_ = dilation_ = factor_ = {1, 1, 1};
    padding_ = {0, 0, 0};
    in_ = out_ = {1, 1, 1};
    for (int axis = 0; axis < ndim_; ++axis) {
      const int a = 3 - ndim_ + axis;
      kernel_[a] = static_cast<int>(call.core->size(2 + axis));
      stride_[a] = static_cast<int>(call.stride[axis]);
      padding_[a] = static_cast<int>(call.padding[axis]);
      dilation_[a] = static_cast<int>(call.dilation[axis]);
      for (size_t i = 0; i < call.sources.size(); ++i)
        if (is_coarse(i)) factor_[a] = static_cast<int>(call.reduce[i]->size(axis));
      in_[a] = static_cast<int>(call.sources[0].size(2 + axis)) * (is_coarse(0) ? factor_[a] : 1);
      STD_TORCH_CHECK(stride_[a] > 0 && dilation_[a] > 0 && padding_[a] >= 0, call.op, ": stride and dilation must be positive, padding not negative");
      out_[a] = (in_[a] + 2 * padding_[a] - dilation_[a] * (kernel_[a] - 1) - 1) / stride_[a] + 1;
      STD_TORCH_CHECK(out_[a] > 0, call.op, ": the kernel does not fit into the input");
    }
    for (size_t i = 0; i < call.sources.size(); ++i) {
      for (int axis = 0; axis < ndim_; ++axis) {
        const int a = 3 - ndim_ + axis;
        const int64_t factor = is_coarse(i) ? call.reduce[i]->size(axis) : 1;
        STD_TORCH_CHECK((factor == 1 || factor == factor_[a]) && call.sources[i].size(2 + axis) * factor == in_[a], call.op,
                        ": extents of the sources do not fit together");
      }
    }
  }

  Result run();

 private:
  bool is_coarse(size_t i) const { return call_.reduce[i] && call_.reduce[i]->dim() > 2; }
  int positions() const { return factor_[0] * factor_[1] * factor_[2]; }
  int rows_of(size_t i) const {
    if (call_.reduce[i]) return static_cast<int>(call_.reduce[i]->size(call_.reduce[i]->dim() - 2));
    return static_cast<int>(call_.expand[i] ? call_.expand[i]->size(0) : call_.sources[i].size(1));
  }
  ScalarType dtype() const { return call_.core->scalar_type(); }

  void check(const std::string& error) const { STD_TORCH_CHECK(error.empty(), call_.op, ": ", error); }

  template <class T>
  const T* input(const Tensor& tensor) {
    const void* data = tensor.const_data_ptr();
    lend(data, tensor.numel() * tensor.element_size(), false);
    return static_cast<const T*>(data);
  }
  const void* input(const std::optional<Tensor>& tensor) { return tensor ? input<void>(*tensor) : nullptr; }
  void* output(Tensor& tensor) {
    lend(tensor.const_data_ptr(), tensor.numel() * tensor.element_size(), true);
    return tensor.mutable_data_ptr();
  }
  static void lend([[maybe_unused]] const void* data, [[maybe_unused]] int64_t bytes, [[maybe_unused]] bool writable) {
#if defined(TUCKER_EMULATED_GPU)
    emulation::lend(data, bytes, writable);
#endif
  }
  Tensor scratch(const std::vector<int64_t>& size, ScalarType type) {
    return torch::stable::new_empty(call_.sources[0], size, type);
  }

  Values values_of(size_t i, const Tensor& tensor, int channels) const {
    Extents extent = in_;
    for (int a = 0; a < 3; ++a) extent[a] /= is_coarse(i) ? factor_[a] : 1;
    return {tensor, channels, channels, extent};
  }

  Source source_of(const Values& values, size_t i, bool pending);
  Tensor packed(const void* from, int rows, int columns, int pitch, int64_t taps, int64_t tap_stride, int64_t row_stride, int64_t column_stride);
  Packed packed_core(int offset, int channels, int64_t taps, bool alone);
  bool expansion_fits() const;
  void pack_now();
  void weigh(Source& source, const Tensor& weight, int rows, int pitch);
  GatherParams gather(const Extents& out) const;
  Values gathered(GatherParams& p, int columns, const std::optional<Tensor>& bias);
  void launch(GatherParams& p, int64_t depth, bool moments = false);
  void statistics(const Tensor& moments, int64_t blocks);
  std::optional<StreamChoice> stream_choice(std::string& reason) const;
  Shape shape(const char* obstacle) const;
  const char* obstacle() const;
  void stream(const StreamChoice& choice);
  Values expanded(size_t i);
  Values first_stage(const std::vector<Values>& sources);
  void stages();

  const Call& call_;
  OnDevice on_;
  int64_t ndim_;
  Kind kind_;
  Device device_;
  int batch_, rank_in_, rank_out_, out_channels_;
  Extents kernel_, stride_, padding_, dilation_, factor_, in_, out_;
  std::optional<Tensor> values_, mean_, m2_;
  PackParams pack_{};
  int jobs_ = 0;
  // Lives until all launches are queued; torch reuses it in the order of the stream.
  std::vector<Tensor> kept_;
};

Source Execution::source_of(const Values& values, size_t i, bool pending) {
  Source source{};
  source.x = input<void>(values.tensor);
  source.channels = values.channels;
  source.spacing = values.spacing;
  source.slope = 1.0f;
  if (pending) {
    source.scale = static_cast<const float*>(input(call_.scale[i]));
    source.shift = static_cast<const float*>(input(call_.shift[i]));
    source.slope = static_cast<float>(call_.slope[i]);
  }
  std::copy(values.extent.begin(), values.extent.end(), source.extent);
  source.coarse = is_coarse(i) && positions() > 1 && values.extent != in_;
  source.vectors = values.spacing % chunk_of(kind_) == 0 && aligned(source.x);
  return source;
}

Tensor Execution::packed(const void* from, int rows, int columns, int pitch, int64_t taps, int64_t tap_stride, int64_t row_stride,
                         int64_t column_stride) {
  const int padded = static_cast<int>(round_up(rows, 8));
  Tensor to = scratch({taps, padded, pitch}, dtype());
  if (jobs_ == kMostJobs) pack_now();
  pack_.job[jobs_++] = {from, output(to), rows, columns, padded, pitch, taps, tap_stride, row_stride, column_stride};
  kept_.push_back(to);
  return to;
}

// Everything queued, before the first kernel that reads it.
void Execution::pack_now() {
  if (jobs_ > 0) check(start_pack(kind_, pack_, jobs_, on_.stream()));
  jobs_ = 0;
}

// A packed weight [taps or classes, rows rounded up, pitch].
void Execution::weigh(Source& source, const Tensor& weight, int rows, int pitch) {
  source.weight = input<void>(weight);
  source.pitch = pitch;
  source.tap_stride = round_up(rows, 8) * pitch;
}

GatherParams Execution::gather(const Extents& out) const {
  GatherParams p{};
  for (int a = 0; a < 3; ++a) {
    p.factor[a] = p.kernel[a] = p.stride[a] = p.dilation[a] = 1;
    p.out[a] = out[a];
  }
  p.slope = 1.0f;
  return p;
}

// Fresh scratch that the product's columns go to, padded to whole 16 bytes.
Values Execution::gathered(GatherParams& p, int columns, const std::optional<Tensor>& bias) {
  const int pitch = static_cast<int>(round_up(columns, chunk_of(kind_)));
  Tensor to = scratch({batch_, static_cast<int64_t>(p.out[0]) * p.out[1] * p.out[2], pitch}, dtype());
  kept_.push_back(to);
  p.columns = columns;
  p.bias = input(bias);
  p.y = output(to);
  p.y_pitch = p.y_columns = pitch;
  p.y_vectors = true;
  return {to, columns, pitch, {p.out[0], p.out[1], p.out[2]}};
}

// Runs the product of `depth` channels summed up; with `moments`, statistics of what it writes as well.
void Execution::launch(GatherParams& p, int64_t depth, bool moments) {
  int64_t voxels = 1;
  for (int a = 0; a < 3; ++a) voxels *= p.out[a] / p.factor[a];
  STD_TORCH_CHECK(voxels <= INT32_MAX - 4096, call_.op, ": at most 2^31 voxels an item, got ", voxels);
  const int form = choose_gather(kind_, device_, batch_ * positions(), voxels, p.columns, depth, p.expansion.u_out != nullptr);
  STD_TORCH_CHECK(form >= 0, call_.op, ": no kernel has ", p.columns, " columns and a third stage");
  const int64_t blocks = gather_blocks(p, gather_forms(kind_)[form]);
  std::optional<Tensor> partial;
  if (moments) {
    partial = scratch({batch_, blocks, out_channels_, 3}, ScalarType::Float);
    p.moments = static_cast<Moments*>(output(*partial));
  }
  pack_now();
  check(start_gather(kind_, form, p, batch_, on_.stream()));
  if (partial) statistics(*partial, blocks);
}

void Execution::statistics(const Tensor& moments, int64_t blocks) {
  MergeMomentsParams p{static_cast<const Moments*>(input<void>(moments)), static_cast<int>(blocks), out_channels_, 1, nullptr,
                       static_cast<float*>(output(*mean_)), static_cast<float*>(output(*m2_))};
  // Thousands of blocks one after the other would take longer than the convolution.
  if (blocks > 2 * kMergedTogether) {
    MergeMomentsParams parts = p;
    parts.splits = static_cast<int>(std::min<int64_t>((blocks + kMergedTogether - 1) / kMergedTogether, kMostSplits));
    Tensor merged = scratch({batch_, parts.splits, out_channels_, 3}, ScalarType::Float);
    kept_.push_back(merged);
    parts.merged = static_cast<Moments*>(output(merged));
    check(start_merge_moments(parts, batch_, on_.stream()));
    p.moments = parts.merged;
    p.blocks = parts.splits;
  }
  check(start_merge_moments(p, batch_, on_.stream()));
}

// Why the one-pass kernel cannot run the call, whatever its sizes.
const char* Execution::obstacle() const {
  if (!call_.u_out) return "the one-pass kernel ends with a third stage";
  if (call_.contiguous) return "the one-pass kernel writes channels-last";
  if (call_.float32_values && kind_ < Kind::kTf32) return "the one-pass kernel writes the sources' dtype";
  int rows = 0;
  for (size_t i = 0; i < call_.sources.size(); ++i) {
    if (!call_.reduce[i]) return "the one-pass kernel begins with a first stage for every source";
    if (call_.expand[i]) return "the one-pass kernel does not expand sources in rank space";
    rows += rows_of(i);
    if (call_.sources[i].size(1) % chunk_of(kind_) || !aligned(call_.sources[i].const_data_ptr()) || !aligned(call_.reduce[i]->const_data_ptr()))
      return "the one-pass kernel takes sources and factors in whole 16 bytes";
    for (const auto& pending : {call_.scale[i], call_.shift[i]})
      if (pending && !aligned(pending->const_data_ptr())) return "the one-pass kernel takes norms that begin at whole 16 bytes";
  }
  if (call_.sources.size() > 1 && rows == rank_in_) return "the one-pass kernel adds sources, it does not put them side by side";
  if (out_channels_ % chunk_of(kind_)) return "the one-pass kernel writes channels in whole 16 bytes";
  return nullptr;
}

Shape Execution::shape(const char* obstacle) const {
  Shape s{};
  s.batch = batch_;
  for (size_t i = 0; i < call_.sources.size(); ++i)
    s.channels += static_cast<int>(call_.expand[i] ? call_.expand[i]->size(0) : call_.sources[i].size(1));
  s.rank_in = rank_in_;
  s.rank_out = rank_out_;
  s.out_channels = out_channels_;
  for (int a = 0; a < 3; ++a) {
    s.in[a] = in_[a];
    s.out[a] = out_[a];
  }
  s.kernel = kernel_;
  s.stride = stride_;
  s.padding = padding_;
  s.dilation = dilation_;
  s.factor = factor_;
  s.moments = call_.stats == "channel";
  s.obstacle = obstacle;
  return s;
}

std::optional<StreamChoice> Execution::stream_choice(std::string& reason) const {
  const Shape s = shape(obstacle());
  const std::optional<StreamChoice> best = choose_stream(kind_, device_, s, reason);
  const auto& c = call_.choice;
  if (c.size() < 2 || c[1] < 0) {
    if (best && best->microseconds > stages_microseconds(kind_, device_, s)) return std::nullopt;
    return best;
  }
  if (c[1] == 0) return std::nullopt;
  const bool demanded = c[1] == 1;
  STD_TORCH_CHECK(best || !demanded, call_.op, ": ", reason);
  if (!best || c.size() < 4) return best;
  const auto& forms = stream_forms(kind_);
  const int number = static_cast<int>(c[2]), step = step_of(kind_);
  bool fits = c[2] >= 0 && c[2] < static_cast<int64_t>(forms.size()) && c[3] > 0;
  if (fits) {
    const StreamForm& form = forms[number];
    fits = form.steps_in * step >= rank_in_ && form.steps_out * step >= rank_out_ && form.depth == kernel_[0] && form.stride == stride_[1] &&
           form.stride_depth == stride_[0] && form.least_capability <= device_.capability &&
           stream_shared_bytes(kind_, number, out_channels_, s.moments) <= device_.shared_per_block;
  }
  STD_TORCH_CHECK(fits || !demanded, call_.op, ": form ", c[2], " with chunks of ", c[3], " does not compute this");
  if (!fits) return best;
  return StreamChoice{number, static_cast<int>(std::min<int64_t>(c[3], out_[0])), best->microseconds};
}

void Execution::stream(const StreamChoice& choice) {
  const StreamForm& form = stream_forms(kind_)[choice.form];
  StreamParams p{};
  p.sources = static_cast<int>(call_.sources.size());
  for (int i = 0; i < p.sources; ++i) {
    p.source[i] = source_of(values_of(i, call_.sources[i], static_cast<int>(call_.sources[i].size(1))), i, true);
    p.source[i].weight = input(call_.reduce[i]);
    p.source[i].pitch = p.source[i].channels;
    p.source[i].tap_stride = static_cast<int64_t>(rank_in_) * p.source[i].pitch;
  }
  p.in_bias = input(call_.in_bias);
  p.core = input<void>(*call_.core);
  p.rank_in = rank_in_;
  p.rank_out = rank_out_;
  const int pitch = form.steps_out * step_of(kind_);
  p.expansion.bias = input(call_.bias);
  p.expansion.channels = out_channels_;
  p.expansion.pitch = pitch;
  if (rank_out_ == pitch && aligned(call_.u_out->const_data_ptr()))
    p.expansion.u_out = input(call_.u_out);
  else
    p.expansion.u_out = input<void>(packed(input(call_.u_out), out_channels_, rank_out_, pitch, 1, 0, rank_out_, 1));
  p.y = output(*values_);
  std::copy(in_.begin(), in_.end(), p.in);
  std::copy(out_.begin(), out_.end(), p.out);
  std::copy(padding_.begin(), padding_.end(), p.padding);
  std::copy(factor_.begin(), factor_.end(), p.factor);
  p.chunk = choice.chunk;
  p.tiles[0] = (out_[0] + choice.chunk - 1) / choice.chunk;
  p.tiles[1] = (out_[1] + form.height - 1) / form.height;
  p.tiles[2] = (out_[2] + form.width - 1) / form.width;
  std::optional<Tensor> moments;
  if (call_.stats == "channel") {
    moments = scratch({batch_, stream_blocks(p), out_channels_, 3}, ScalarType::Float);
    p.moments = static_cast<Moments*>(output(*moments));
  }
  pack_now();
  check(start_stream(kind_, choice.form, p, batch_, on_.stream()));
  if (moments) statistics(*moments, stream_blocks(p));
}

// A source in rank space, written out in its channels with its norm and activation.
Values Execution::expanded(size_t i) {
  const Tensor& matrix = *call_.expand[i];
  const int channels = static_cast<int>(matrix.size(0)), ranks = static_cast<int>(matrix.size(1));
  const Values z = values_of(i, call_.sources[i], ranks);
  GatherParams p = gather(z.extent);
  p.sources = 1;
  p.source[0] = source_of(z, i, false);
  p.source[0].coarse = false;
  const int pitch = static_cast<int>(round_up(ranks, group_of(kind_)));
  weigh(p.source[0], packed(input<void>(matrix), channels, ranks, pitch, 1, 0, ranks, 1), channels, pitch);
  Values values = gathered(p, channels, std::nullopt);
  p.scale = static_cast<const float*>(input(call_.scale[i]));
  p.shift = static_cast<const float*>(input(call_.shift[i]));
  p.slope = static_cast<float>(call_.slope[i]);
  launch(p, ranks);
  return values;
}

// t, of all sources.
Values Execution::first_stage(const std::vector<Values>& sources) {
  int rows = 0;
  for (size_t i = 0; i < sources.size(); ++i) rows += rows_of(i);
  const bool side_by_side = sources.size() > 1 && rows == rank_in_;
  GatherParams p = gather(in_);
  Values t = gathered(p, rank_in_, call_.in_bias);
  const auto add = [&](GatherParams& to, size_t i) {
    Source& source = to.source[to.sources++];
    source = source_of(sources[i], i, !call_.expand[i]);
    const int own = rows_of(i), channels = sources[i].channels;
    const int pitch = static_cast<int>(round_up(channels, group_of(kind_)));
    const int64_t classes = is_coarse(i) ? positions() : 1;
    weigh(source, packed(input(call_.reduce[i]), own, channels, pitch, classes, static_cast<int64_t>(own) * channels, channels, 1), own, pitch);
    if (source.coarse) std::copy(factor_.begin(), factor_.end(), to.factor);
  };
  if (!side_by_side) {
    int64_t depth = 0;
    for (size_t i = 0; i < sources.size(); ++i) {
      add(p, i);
      depth += sources[i].channels;
    }
    launch(p, depth);
    return t;
  }
  int offset = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    GatherParams part = p;
    add(part, i);
    part.columns = rows_of(i);
    part.y_column = offset;
    part.y_columns = i + 1 == sources.size() ? t.spacing - offset : part.columns;
    part.y_vectors = offset % chunk_of(kind_) == 0 && part.y_columns % chunk_of(kind_) == 0;
    if (part.bias) part.bias = static_cast<const char*>(part.bias) + static_cast<int64_t>(offset) * bytes_of(kind_);
    offset += part.columns;
    launch(part, sources[i].channels);
  }
  return t;
}

// Statistics of all output channels lie in shared memory.
bool Execution::expansion_fits() const {
  const auto& forms = gather_forms(kind_);
  for (int form = 0; form < static_cast<int>(forms.size()); ++form)
    if (forms[form].expands && gather_shared_bytes(kind_, form, out_channels_, call_.stats == "channel") > device_.shared_per_block) return false;
  return true;
}

// The part of the core that `channels` of its inputs, from `offset` on, are multiplied by.
Packed Execution::packed_core(int offset, int channels, int64_t taps, bool alone) {
  const auto* core = static_cast<const char*>(input<void>(*call_.core)) + offset * taps * bytes_of(kind_);
  int64_t plane = 1, reach = 0;
  for (int a = 2; a >= 0; --a) {
    reach = std::max<int64_t>(reach, static_cast<int64_t>(kernel_[a] - 1) * dilation_[a]);
    if (a > 0) plane *= in_[a];
  }
  // Distances are 32 bits, of each axis 8.
  const bool taps_within = alone && taps > 1 && channels < chunk_of(kind_) && taps * channels <= kMostTaps && reach < 256 &&
                           plane * channels * (reach + 1) < INT32_MAX;
  const int columns = static_cast<int>(taps_within ? channels * taps : channels);
  const int pitch = static_cast<int>(round_up(columns, group_of(kind_)));
  if (taps_within) return {packed(core, rank_out_, columns, pitch, 1, 0, columns, 1), pitch, true};
  return {packed(core, rank_out_, columns, pitch, taps, 1, rank_in_ * taps, taps), pitch, false};
}

void Execution::stages() {
  std::vector<Values> sources;
  bool direct = !call_.in_bias;
  for (size_t i = 0; i < call_.sources.size(); ++i) {
    sources.push_back(call_.expand[i] ? expanded(i) : values_of(i, call_.sources[i], static_cast<int>(call_.sources[i].size(1))));
    direct = direct && !call_.reduce[i] && !call_.expand[i];
  }
  // All factors are packed before the first launch, so that one kernel packs them.
  const int64_t taps = static_cast<int64_t>(kernel_[0]) * kernel_[1] * kernel_[2];
  const bool element_values = values_->scalar_type() == dtype();
  const bool vectors = !call_.contiguous && element_values && out_channels_ % chunk_of(kind_) == 0 && aligned(values_->const_data_ptr());
  const bool together = call_.u_out && vectors && expands_in_gather(kind_, rank_out_) && expansion_fits();
  std::vector<Packed> cores;
  int offset = 0;
  for (size_t i = 0; i < (direct ? sources.size() : 1); ++i) {
    const int channels = direct ? sources[i].channels : rank_in_;
    cores.push_back(packed_core(offset, channels, taps, direct && sources.size() == 1));
    offset += channels;
  }
  std::optional<Packed> u_out;
  if (call_.u_out) {
    const int pitch = static_cast<int>(together ? round_up(rank_out_, 64) : round_up(rank_out_, group_of(kind_)));
    u_out = Packed{packed(input(call_.u_out), out_channels_, rank_out_, pitch, 1, 0, rank_out_, 1), pitch, false};
  }
  std::vector<Values> read = sources;
  if (!direct) read = {first_stage(sources)};

  GatherParams p = gather(out_);
  std::copy(kernel_.begin(), kernel_.end(), p.kernel);
  std::copy(stride_.begin(), stride_.end(), p.stride);
  std::copy(padding_.begin(), padding_.end(), p.padding);
  std::copy(dilation_.begin(), dilation_.end(), p.dilation);
  for (size_t i = 0; i < read.size(); ++i) {
    Source& source = p.source[p.sources++];
    source = source_of(read[i], i, direct);
    source.coarse = false;
    source.taps_within = cores[i].taps_within;
    weigh(source, cores[i].weight, rank_out_, cores[i].pitch);
  }
  const int64_t depth = taps * rank_in_;
  const auto to_values = [&](GatherParams& to) {
    to.columns = out_channels_;
    to.bias = input(call_.bias);
    to.y = output(*values_);
    to.y_is_float = !element_values;
    to.y_vectors = vectors;
    to.y_channel = call_.contiguous;
    to.y_pitch = to.y_columns = out_channels_;
  };
  const bool wanted = call_.stats == "channel";
  if (!call_.u_out) {
    to_values(p);
    launch(p, depth, wanted);
  } else if (together) {
    to_values(p);
    p.expansion = {input<void>(u_out->weight), p.bias, u_out->pitch, out_channels_};
    p.bias = nullptr;
    p.columns = rank_out_;
    launch(p, depth, wanted);
  } else {
    const Values z = gathered(p, rank_out_, std::nullopt);
    launch(p, depth);
    GatherParams last = gather(out_);
    last.sources = 1;
    last.source[0] = source_of(z, 0, false);
    last.source[0].coarse = false;
    weigh(last.source[0], u_out->weight, out_channels_, u_out->pitch);
    to_values(last);
    launch(last, rank_out_, wanted);
  }
  if (call_.stats == "covariance") {
    const int64_t voxels = static_cast<int64_t>(out_[0]) * out_[1] * out_[2];
    const int64_t pairs = static_cast<int64_t>(out_channels_) * out_channels_;
    // Few enough that what chunks leave is 64 MB at most.
    const int64_t chunks = std::clamp<int64_t>(std::min(voxels / 2048, (int64_t{1} << 24) / (pairs * batch_)), 1, 1024);
    Tensor products = scratch({batch_, chunks, pairs}, ScalarType::Float), sums = scratch({batch_, chunks, out_channels_}, ScalarType::Float);
    CovarianceParams c{input<void>(*values_), static_cast<float*>(output(products)), static_cast<float*>(output(sums)),
                       static_cast<float*>(output(*mean_)), static_cast<float*>(output(*m2_)), voxels, out_channels_, static_cast<int>(chunks)};
    check(start_covariance(element_values ? kind_ : Kind::kFp32, c, batch_, on_.stream()));
  }
}

Result Execution::run() {
  std::vector<int64_t> size{batch_, out_channels_};
  for (int axis = 0; axis < ndim_; ++axis) size.push_back(out_[3 - ndim_ + axis]);
  const auto last = ndim_ == 2 ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::ChannelsLast3d;
  values_ = torch::stable::empty(size, call_.float32_values ? ScalarType::Float : dtype(), std::nullopt, call_.sources[0].device(), std::nullopt,
                                  call_.contiguous ? torch::headeronly::MemoryFormat::Contiguous : last);
  const std::vector<int64_t> channels{batch_, call_.stats == "none" ? 0 : out_channels_};
  mean_ = scratch(channels, ScalarType::Float);
  m2_ = scratch(call_.stats == "covariance" ? std::vector<int64_t>{batch_, out_channels_, out_channels_} : channels, ScalarType::Float);
  if (values_->numel() > 0) {
    std::string reason;
    if (const std::optional<StreamChoice> choice = stream_choice(reason))
      stream(*choice);
    else
      stages();
  }
  return {*values_, *mean_, *m2_};
}

}  // namespace

Result execute(const Call& call) { return Execution(call).run(); }

}  // namespace tucker_ops::cuda
