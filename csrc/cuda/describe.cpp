// For Python's `explain` and `tune`, through ctypes: what the choice of kernels would be, without tensors.
#include <algorithm>
#include <cstdio>

#include "plan.h"

using namespace tucker_ops::cuda;

namespace {

// 0 float16, 1 bfloat16, 2 float32 by TF32, 3 float32.
bool read_kind(int64_t number, Kind& kind) {
  kind = static_cast<Kind>(number);
  return number >= 0 && number <= 3;
}

}  // namespace

// numbers: kind; capability, multiprocessors, shared memory of a block and of a multiprocessor; batch, channels, rank_in,
// rank_out, out_channels; in, out, kernel, stride, padding, dilation, three each. Returns 1 for the one-pass kernel, then
// result holds form, chunk, rows and columns of a tile and nanoseconds by the model; 0 for the stages one by one, then text
// says why; -1 where numbers make no sense. result[5] holds the model's nanoseconds of the stages.
extern "C" __attribute__((visibility("default"))) int tucker_ops_cuda_plan(const int64_t* numbers, int64_t* result, char* text, int64_t size) {
  Kind kind;
  if (!read_kind(numbers[0], kind)) return -1;
  const auto at = [&](int i) { return static_cast<int>(numbers[i]); };
  const Device device{at(1), at(2), at(3), at(4)};
  Shape shape{};
  shape.batch = at(5);
  shape.channels = at(6);
  shape.rank_in = at(7);
  shape.rank_out = at(8);
  shape.out_channels = at(9);
  for (int a = 0; a < 3; ++a) {
    shape.in[a] = numbers[10 + a];
    shape.out[a] = numbers[13 + a];
    shape.kernel[a] = at(16 + a);
    shape.stride[a] = at(19 + a);
    shape.padding[a] = at(22 + a);
    shape.dilation[a] = at(25 + a);
    shape.factor[a] = 1;
  }
  if (shape.channels % chunk_of(kind) || shape.out_channels % chunk_of(kind)) shape.obstacle = "the one-pass kernel takes channels in whole 16 bytes";
  std::string reason;
  const auto choice = choose_stream(kind, device, shape, reason);
  const double stages = stages_microseconds(kind, device, shape);
  result[5] = static_cast<int64_t>(stages * 1000);
  if (!choice || choice->microseconds > stages) {
    if (choice) reason = "by the model the stages one by one are faster";
    std::snprintf(text, size, "%s", reason.c_str());
    return 0;
  }
  const StreamForm& form = stream_forms(kind)[choice->form];
  const int64_t chosen[5] = {choice->form, choice->chunk, form.height, form.width, static_cast<int64_t>(choice->microseconds * 1000)};
  std::copy_n(chosen, 5, result);
  return 1;
}

// Forms of the one-pass kernel that compute with these ranks, kernel and stride on a device of this capability, as their
// numbers; returns how many there are, at most `size`.
extern "C" __attribute__((visibility("default"))) int64_t tucker_ops_cuda_forms(const int64_t* numbers, int64_t* forms, int64_t size) {
  Kind kind;
  if (!read_kind(numbers[0], kind)) return 0;
  const int step = step_of(kind);
  int64_t count = 0;
  for (const StreamForm& form : stream_forms(kind)) {
    const int64_t number = &form - stream_forms(kind).data();
    const bool fits = form.steps_in * step >= numbers[7] && form.steps_out * step >= numbers[8] && form.depth == numbers[16] &&
                      form.stride_depth == numbers[19] && form.stride == numbers[20] && form.least_capability <= numbers[1] &&
                      stream_shared_bytes(kind, static_cast<int>(number), static_cast<int>(numbers[9]), false) <= numbers[3];
    if (fits && count < size) forms[count++] = number;
  }
  return count;
}

// Form `number` of a kind of the one-pass kernel: steps of rank_in and rank_out, depth, strides along depth and in the
// plane, rows and columns of a tile, the least capability, and bytes of shared memory for `channels` with statistics.
// Returns 0 beyond the last form.
extern "C" __attribute__((visibility("default"))) int tucker_ops_cuda_form(int64_t kind_number, int64_t number, int64_t channels, int64_t* result) {
  Kind kind;
  if (!read_kind(kind_number, kind) || number < 0 || number >= static_cast<int64_t>(stream_forms(kind).size())) return 0;
  const StreamForm& f = stream_forms(kind)[number];
  const int64_t shared = stream_shared_bytes(kind, static_cast<int>(number), static_cast<int>(channels), true);
  const int64_t values[9] = {f.steps_in, f.steps_out, f.depth, f.stride_depth, f.stride, f.height, f.width, f.least_capability, shared};
  std::copy_n(values, 9, result);
  return 1;
}
