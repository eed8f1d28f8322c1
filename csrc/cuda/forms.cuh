// The compiled forms of the kernels of one kind of numbers, as functions over lists of types.
#pragma once

#include <tuple>

#include "gather.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "small.cuh"
#include "stream.cuh"

namespace tucker_ops::cuda {

template <class... Kernels>
struct Forms {
  // Calls f with a null pointer to the form's type.
  template <class F>
  static auto visit(int form, const F& f) {
    using Result = decltype(f(static_cast<std::tuple_element_t<0, std::tuple<Kernels...>>*>(nullptr)));
    Result result{};
    int i = 0;
    ((i++ == form ? (result = f(static_cast<Kernels*>(nullptr)), 0) : 0), ...);
    return result;
  }
  template <class Form, class F>
  static std::vector<Form> all(const F& f) {
    return {f(static_cast<Kernels*>(nullptr))...};
  }
};

template <class M, class StreamForms, class GatherForms>
struct KernelsOf {
  static std::vector<StreamForm> stream_forms() {
    return StreamForms::template all<StreamForm>([](auto* kernel) {
      using K = std::remove_pointer_t<decltype(kernel)>;
      return StreamForm{K::kStepsIn, K::kStepsOut, K::kDepth, K::kStrideDepth, K::kStride, K::kHeight, K::kWidth, K::kLeastCapability, K::kSlots, K::kBlocks};
    });
  }
  static std::vector<GatherForm> gather_forms() {
    return GatherForms::template all<GatherForm>([](auto* kernel) {
      using K = std::remove_pointer_t<decltype(kernel)>;
      return GatherForm{K::kBlockVoxels, K::kBlockColumns, K::kRowWarps * K::kSliceWarps, K::kSliceWarps, K::kExpands};
    });
  }
  static int stream_shared_bytes(int form, int channels, bool moments) {
    return StreamForms::visit(form, [&](auto* kernel) {
      return std::remove_pointer_t<decltype(kernel)>::shared_bytes(channels, moments);
    });
  }
  static int gather_shared_bytes(int form, int channels, bool moments) {
    return GatherForms::visit(form, [&](auto* kernel) { return std::remove_pointer_t<decltype(kernel)>::shared_bytes(channels, moments); });
  }
  static std::string start_stream(int form, const StreamParams& p, int batch, void* stream) {
    return StreamForms::visit(form, [&](auto* kernel) {
      using K = std::remove_pointer_t<decltype(kernel)>;
      const int shared = K::shared_bytes(p.expansion.channels, p.moments != nullptr);
      return start<K>(p, {stream_blocks(p), batch}, shared, stream);
    });
  }
  static std::string start_gather(int form, const GatherParams& p, int batch, void* stream) {
    return GatherForms::visit(form, [&](auto* kernel) {
      using K = std::remove_pointer_t<decltype(kernel)>;
      const GatherForm shape{K::kBlockVoxels, K::kBlockColumns, 0, 0, K::kExpands};
      const int64_t columns = K::kExpands ? 1 : ((p.y_columns > p.columns ? p.y_columns : p.columns) + K::kBlockColumns - 1) / K::kBlockColumns;
      const int channels = K::kExpands ? p.expansion.channels : p.columns;
      int shared = K::shared_bytes(channels, p.moments != nullptr);
      if (p.source[0].taps_within)
        shared = (shared + 15) / 16 * 16 + p.source[0].channels * p.kernel[0] * p.kernel[1] * p.kernel[2] * K::kTapBytes;
      return start<K>(p, {gather_blocks(p, shape), columns, batch}, shared, stream);
    });
  }
  static std::string start_pack(PackParams p, int jobs, void* stream) {
    int64_t most = 1;
    for (int i = 0; i < jobs; ++i) {
      const int64_t elements = p.job[i].taps * p.job[i].padded_rows * p.job[i].pitch;
      most = elements > most ? elements : most;
    }
    const int64_t blocks = (most + Pack<M>::kThreads - 1) / Pack<M>::kThreads;
    p.blocks = static_cast<int>(blocks < 256 ? blocks : 256);
    return start<Pack<M>>(p, {p.blocks, jobs}, 0, stream);
  }
  static std::string start_covariance(const CovarianceParams& p, int batch, void* stream) {
    const int tiles = (p.channels + Covariance<M>::kSide - 1) / Covariance<M>::kSide;
    const std::string error = start<Covariance<M>>(p, {p.chunks, tiles * tiles, batch}, Covariance<M>::kShared, stream);
    if (!error.empty()) return error;
    const int pairs = p.channels * p.channels;
    return start<MergeCovariance<M>>(p, {(pairs + MergeCovariance<M>::kThreads - 1) / MergeCovariance<M>::kThreads, batch}, 0, stream);
  }
  static std::string start_merge(MergeParams p, void* stream) {
    p.vectors = p.vectors && p.channels % M::kChunk == 0;
    const int64_t blocks = (p.voxels * p.channels / (p.vectors ? M::kChunk : 1) + Merge<M>::kThreads - 1) / Merge<M>::kThreads;
    p.blocks = static_cast<int>(blocks < 4096 ? blocks : 4096);
    return start<Merge<M>>(p, {p.blocks, p.batch}, 0, stream);
  }
};

// Ranks up to 32 of 2 bytes. Tiles are as large as registers for the sums allow: up to 144 a thread, 192 on sm_90.
template <class M>
using StreamForms16 =
    Forms<Stream<M, 1, 2, 3, 1, 1, 8, 32>, Stream<M, 2, 2, 3, 1, 1, 8, 32>, Stream<M, 1, 1, 3, 1, 1, 12, 32>, Stream<M, 2, 1, 3, 1, 1, 12, 32>,
          Stream<M, 1, 2, 3, 1, 1, 12, 16>, Stream<M, 2, 2, 3, 1, 1, 12, 16>, Stream<M, 1, 1, 1, 1, 1, 16, 32>, Stream<M, 2, 1, 1, 1, 1, 16, 32>,
          Stream<M, 1, 2, 1, 1, 1, 8, 32>, Stream<M, 2, 2, 1, 1, 1, 8, 32>, Stream<M, 1, 1, 3, 2, 2, 8, 32>, Stream<M, 1, 2, 3, 2, 2, 8, 32>,
          Stream<M, 2, 1, 3, 2, 2, 4, 32>, Stream<M, 2, 2, 3, 2, 2, 4, 32>, Stream<M, 1, 1, 1, 1, 2, 8, 32>, Stream<M, 1, 2, 1, 1, 2, 8, 32>,
          Stream<M, 2, 1, 1, 1, 2, 4, 32>, Stream<M, 2, 2, 1, 1, 2, 4, 32>>;
// Rank 16 of 4 bytes. Splitting factors in two takes registers, so tiles of float32 proper are smaller.
template <class M>
using StreamFormsTf32 = Forms<Stream<M, 2, 2, 3, 1, 1, 12, 32>, Stream<M, 2, 2, 1, 1, 1, 16, 32>>;
template <class M>
using StreamFormsFp32 = Forms<Stream<M, 2, 2, 3, 1, 1, 8, 16>, Stream<M, 2, 2, 1, 1, 1, 8, 32>>;

// 64 and 32 columns, kGroups groups being 32; kRows tiles of 16 voxels a warp. The third and fourth are for small maps,
// whose sums are shared out among warps.
template <class M, int kGroups, int kRows>
using GatherFormsOf = Forms<Gather<M, kRows, 2 * kGroups, 4, 1, false>, Gather<M, 2, kGroups, 4, 1, false>, Gather<M, 1, 2 * kGroups, 1, 8, false>,
                            Gather<M, 1, kGroups, 1, 4, false>, Gather<M, 2, kGroups, 4, 1, true>, Gather<M, kRows, 2 * kGroups, 4, 1, true>>;

}  // namespace tucker_ops::cuda
