// Kernels that take little time beside the convolutions: packing weights, merging statistics, covariances, additions.
#pragma once

#include "stages.cuh"

namespace tucker_ops::cuda {

// Merges what a part of the blocks saw, always in the same order: 8 strands of blocks, then the strands.
struct MergeMoments {
  using Params = MergeMomentsParams;
  static constexpr int kStrands = 8, kThreads = 32 * kStrands, kBlocks = 1;
  static constexpr int kShared = kThreads * 12;

  static TUCKER_DEVICE void run(const Params& p) {
    const int lane = thread_index() % 32, strand = thread_index() / 32;
    const int channel = block_index().x * 32 + lane, n = block_index().y;
    Moments all{0.0f, 0.0f, 0.0f};
    if (channel < p.channels) {
      const Moments* from = p.moments + static_cast<int64_t>(n) * p.blocks * p.channels + channel;
      const int length = (p.blocks + p.splits - 1) / p.splits, begin = block_index().z * length;
      const int end = begin + length < p.blocks ? begin + length : p.blocks;
      for (int b = begin + strand; b < end; b += kStrands) {
        const Moments* at = from + static_cast<int64_t>(b) * p.channels;
        all = merged(all, {load(&at->count), load(&at->mean), load(&at->m2)});
      }
    }
    const uint32_t own = shared_base() + thread_index() * 12;
    shared_store4(own, as_word(all.count));
    shared_store4(own + 4, as_word(all.mean));
    shared_store4(own + 8, as_word(all.m2));
    barrier();
    if (strand > 0 || channel >= p.channels) return;
    for (int other = 1; other < kStrands; ++other) {
      const uint32_t at = own + other * 32 * 12;
      all = merged(all, {as_float(shared_load4(at)), as_float(shared_load4(at + 4)), as_float(shared_load4(at + 8))});
    }
    if (p.merged) {
      store(p.merged + (static_cast<int64_t>(n) * p.splits + block_index().z) * p.channels + channel, all);
      return;
    }
    store(p.mean + static_cast<int64_t>(n) * p.channels + channel, all.mean);
    store(p.m2 + static_cast<int64_t>(n) * p.channels + channel, all.m2);
  }
};

// One value a thread.
struct NormAffine {
  using Params = NormParams;
  static constexpr int kThreads = 128, kBlocks = 1;

  static TUCKER_DEVICE float weight_at(const void* values, int bytes, bool bf16, int i) {
    if (bytes == 4) return load(static_cast<const float*>(values) + i);
    const uint32_t word = load(static_cast<const uint16_t*>(values) + i);
    return bf16 ? as_float(word << 16) : fp16_low(word);
  }

  static TUCKER_DEVICE void run(const Params& p) {
    const int i = block_index().x * kThreads + thread_index();
    if (i >= p.total) return;
    const int c = i % p.channels;
    const float variance = load(p.m2 + i) / p.count;
    // Not fmax, which would lose a NaN.
    float scale = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + p.eps);
    if (p.weight) scale *= weight_at(p.weight, p.weight_bytes, p.weight_is_bf16, c);
    float shift = -load(p.mean + i) * scale;
    if (p.bias) shift += weight_at(p.bias, p.bias_bytes, p.bias_is_bf16, c);
    store(p.scale + i, scale);
    store(p.shift + i, shift);
  }
};

template <class M>
struct Pack {
  using Element = typename M::Element;
  using Params = PackParams;
  static constexpr int kThreads = 256, kBlocks = 1;

  static TUCKER_DEVICE void run(const Params& p) {
    const PackJob& job = p.job[block_index().y];
    const int64_t total = job.taps * job.padded_rows * job.pitch;
    for (int64_t i = static_cast<int64_t>(block_index().x) * kThreads + thread_index(); i < total; i += static_cast<int64_t>(p.blocks) * kThreads) {
      const int64_t k = i % job.pitch, row = i / job.pitch % job.padded_rows, tap = i / job.pitch / job.padded_rows;
      Element value = element_of<M>(0.0f);
      if (row < job.rows && k < job.columns) {
        value = job.from ? load(static_cast<const Element*>(job.from) + tap * job.tap_stride + row * job.row_stride + k * job.column_stride)
                         : element_of<M>(row == k ? 1.0f : 0.0f);
      }
      store(static_cast<Element*>(job.to) + i, value);
    }
  }
};

// Products of deviations of 16×16 pairs of channels, over a chunk of voxels.
template <class M>
struct Covariance {
  using Element = typename M::Element;
  using Params = CovarianceParams;
  static constexpr int kSide = 16, kThreads = kSide * kSide, kBlocks = 1, kStage = 32;
  static constexpr int kShared = kStage * 2 * kSide * 4;

  static TUCKER_DEVICE void run(const Params& p) {
    const int tiles = (p.channels + kSide - 1) / kSide;
    const int chunk = block_index().x, n = block_index().z;
    const int first_row = block_index().y / tiles * kSide, first_column = block_index().y % tiles * kSide;
    const int64_t length = (p.voxels + p.chunks - 1) / p.chunks;
    const int64_t begin = chunk * length, end = begin + length < p.voxels ? begin + length : p.voxels;
    const auto* z = static_cast<const Element*>(p.z) + n * p.voxels * p.channels;
    const int i = thread_index() / kSide, j = thread_index() % kSide;
    float product = 0.0f, sum = 0.0f;
    for (int64_t stage = begin; stage < end; stage += kStage) {
      for (int at = thread_index(); at < kStage * 2 * kSide; at += kThreads) {
        const int64_t voxel = stage + at / (2 * kSide);
        const int channel = (at % (2 * kSide) < kSide ? first_row : first_column) + at % kSide;
        float deviation = 0.0f;
        if (voxel < end && channel < p.channels)
          deviation = value_of<M>(load(z + voxel * p.channels + channel)) - value_of<M>(load(z + channel));
        shared_store4(shared_base() + at * 4, as_word(deviation));
      }
      barrier();
      for (int v = 0; v < kStage; ++v) {
        const float a = as_float(shared_load4(shared_base() + (v * 2 * kSide + i) * 4));
        const float b = as_float(shared_load4(shared_base() + (v * 2 * kSide + kSide + j) * 4));
        product = fmaf(a, b, product);
        sum += a;
      }
      barrier();
    }
    const int row = first_row + i, column = first_column + j;
    if (row >= p.channels || column >= p.channels) return;
    const int64_t at = static_cast<int64_t>(n) * p.chunks + chunk;
    store(p.products + (at * p.channels + row) * p.channels + column, product);
    if (column == 0) store(p.sums + at * p.channels + row, sum);
  }
};

template <class M>
struct MergeCovariance {
  using Element = typename M::Element;
  using Params = CovarianceParams;
  static constexpr int kThreads = 128, kBlocks = 1;

  static TUCKER_DEVICE void run(const Params& p) {
    const int pair = block_index().x * kThreads + thread_index(), n = block_index().y;
    if (pair >= p.channels * p.channels) return;
    const int i = pair / p.channels, j = pair % p.channels;
    double product = 0, sum_i = 0, sum_j = 0;
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      const int64_t at = static_cast<int64_t>(n) * p.chunks + chunk;
      product += load(p.products + at * p.channels * p.channels + pair);
      sum_i += load(p.sums + at * p.channels + i);
      sum_j += load(p.sums + at * p.channels + j);
    }
    const double voxels = static_cast<double>(p.voxels);
    store(p.m2 + static_cast<int64_t>(n) * p.channels * p.channels + pair, static_cast<float>(product - sum_i * sum_j / voxels));
    if (j > 0) return;
    const auto* z = static_cast<const Element*>(p.z) + n * p.voxels * p.channels;
    store(p.mean + static_cast<int64_t>(n) * p.channels + i, static_cast<float>(value_of<M>(load(z + i)) + sum_i / voxels));
  }
};

// y = LeakyReLU(Σ LeakyReLU(scale · value + shift)), 16 bytes a thread where channels fill them, else an element.
template <class M>
struct Merge {
  using Element = typename M::Element;
  using Params = MergeParams;
  static constexpr int kThreads = 256, kBlocks = 1;

  template <int kOwn>
  static TUCKER_DEVICE void run_by(const Params& p) {
    const int n = block_index().y, groups = p.channels / kOwn;
    const int64_t per_item = p.voxels * p.channels;
    const int64_t step = static_cast<int64_t>(p.blocks) * kThreads;
    for (int64_t i = static_cast<int64_t>(block_index().x) * kThreads + thread_index(); i < p.voxels * groups; i += step) {
      const int64_t at = n * per_item + i * kOwn;
      const int64_t norm = static_cast<int64_t>(n) * p.channels + i % groups * kOwn;
      float sum[kOwn] = {};
      for (int v = 0; v < p.values; ++v) {
        const auto* from = static_cast<const Element*>(p.value[v]) + at;
        Words4 words = {};
        if constexpr (kOwn > 1) words = load16(from);
        TUCKER_UNROLL
        for (int j = 0; j < kOwn; ++j) {
          float value;
          if constexpr (kOwn == 1)
            value = value_of<M>(load(from));
          else if constexpr (M::kSize == 2)
            value = j % 2 ? M::high(words.v[j / 2]) : M::low(words.v[j / 2]);
          else
            value = as_float(words.v[j]);
          sum[j] += activated(value, p.scale[v] ? load(p.scale[v] + norm + j) : 1.0f, p.shift[v] ? load(p.shift[v] + norm + j) : 0.0f, p.slope[v]);
        }
      }
      TUCKER_UNROLL
      for (int j = 0; j < kOwn; ++j) sum[j] = sum[j] > 0.0f ? sum[j] : sum[j] * p.out_slope;
      if constexpr (kOwn == 1) {
        store(static_cast<Element*>(p.y) + at, element_of<M>(sum[0]));
      } else {
        Words4 words;
        TUCKER_UNROLL
        for (int w = 0; w < 4; ++w) {
          if constexpr (M::kSize == 2)
            words.v[w] = M::pair(sum[2 * w], sum[2 * w + 1]);
          else
            words.v[w] = as_word(sum[w]);
        }
        store16(static_cast<Element*>(p.y) + at, words);
      }
    }
  }

  static TUCKER_DEVICE void run(const Params& p) {
    if (p.vectors)
      run_by<M::kChunk>(p);
    else
      run_by<1>(p);
  }
};

}  // namespace tucker_ops::cuda
