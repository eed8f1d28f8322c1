// The three stages in one pass. A block owns a tile of output rows and columns and walks along depth: of every input
// plane it computes t = u_in · x (halo included) into shared memory, then adds what that plane contributes, kd by kd, to
// the output planes in flight, whose sums stay in registers; a finished plane is multiplied by u_out and stored.
// In device memory there are x and y, nothing else.
//
// Shared memory: two planes of t, so that one barrier a plane is enough; the core's weights as fragments; where each voxel
// of the halo lies. A plane of t is a plane for every 16 bytes of channels, so that a shift by a tap is an offset and
// eight neighbours along the width are eight different banks; at stride 2 even and odd columns lie apart, which makes
// neighbours of the outputs' voxels neighbours again.
#pragma once

#include "stages.cuh"

namespace tucker_ops::cuda {

template <class Math, int kStepsIn_, int kStepsOut_, int kDepth_, int kStrideDepth_, int kStride_, int kHeight_, int kWidth_>
struct Stream {
  using M = Math;
  using Element = typename M::Element;
  using Params = StreamParams;
  static constexpr int kStepsIn = kStepsIn_, kStepsOut = kStepsOut_;    // rank_in and rank_out in steps
  static constexpr int kDepth = kDepth_;                                // of the kernel
  static constexpr int kStrideDepth = kStrideDepth_, kStride = kStride_;
  static constexpr int kHeight = kHeight_, kWidth = kWidth_;            // of the tile of outputs
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kBlocks = 2;
  static constexpr int kTaps = 3, kPlaneTaps = kTaps * kTaps;
  static constexpr int kRows = kHeight * kWidth / 16 / kWarps;          // mma tiles of 16 outputs of a warp
  static constexpr int kAcross = kWidth / 16;                           // of them along a row of the tile
  static constexpr int kTilesIn = kStepsIn * M::kStepTiles, kTilesOut = kStepsOut * M::kStepTiles;
  static_assert((kDepth == 1 && kStrideDepth == 1) || kDepth == 3, "kernels of one or three planes");
  static_assert(kRows % kAcross == 0, "a warp's outputs begin at the tile's left edge");
  // Output planes that an input plane contributes to at most, and those that go on into the next: a slot for each. An
  // input plane is the last of the oldest slot's, always, and the first of the newest's; at stride 2 every other one
  // lies in the middle of a single output plane.
  static constexpr int kSlots = kStrideDepth == 1 ? kDepth : 2, kWaiting = kSlots - 1;
  static constexpr int kSums = kSlots * kRows * kTilesOut * 4;          // of a thread
  // mma tiles of the first stage at a time: as many as registers are left for.
  static constexpr int kBatch = (kSums > 160 || M::kSplits ? 2 : 4) / kStepsIn;
  static constexpr int kEntry = 16 * kBatch;

  static constexpr int kHaloHeight = (kHeight - 1) * kStride + kTaps, kHaloWidth = (kWidth - 1) * kStride + kTaps;
  static constexpr int kHalf = (kHaloWidth + 1) / 2;
  static constexpr int kPitch = kStride == 1 ? kHaloWidth : 2 * kHalf;
  // 64 modulo 128: two 8-byte stores to neighbouring planes then touch different banks.
  static constexpr int kPlane = (kHaloHeight * kPitch * 16 + 63) / 128 * 128 + 64;
  static constexpr int kBuffer = 2 * kStepsIn * kPlane;
  static constexpr int kFragment = 32 * 8;
  static constexpr int kWeights = kPlaneTaps * kStepsIn * kDepth * kTilesOut * kFragment;

  // Entries for the halo's voxels of a class, filled up to whole batches: the larger share of the halo is taken for every
  // class, as which one starts first depends on the tile.
  static TUCKER_BOTH constexpr int per_class(int classes_h, int classes_w) {
    const int rows = (kHaloHeight + classes_h - 1) / classes_h, columns = (kHaloWidth + classes_w - 1) / classes_w;
    return (rows * columns + kEntry - 1) / kEntry * kEntry;
  }
  static TUCKER_BOTH constexpr int most_entries() {
    int most = 0;
    for (int h = 1; h <= 2; ++h)
      for (int w = 1; w <= 2; ++w) most = most > h * w * per_class(h, w) ? most : h * w * per_class(h, w);
    return most;
  }
  // Where things lie in shared memory.
  static constexpr int kTable = most_entries();
  static constexpr uint32_t kWeightsAt = 2 * kBuffer, kVoxelsAt = kWeightsAt + kWeights, kCoarseAt = kVoxelsAt + 4 * kTable,
                            kPositionsAt = kCoarseAt + 4 * kTable, kMomentsAt = (kPositionsAt + 2 * kTable + 15) / 16 * 16;
  static constexpr int shared_bytes(int channels, bool moments) {
    const int padded = (channels + M::kGroup - 1) / M::kGroup * M::kGroup;
    return kMomentsAt + (moments ? kWarps * padded * WarpMoments::kBytes : 0);
  }

  // With more than 160 sums a thread too few registers are left on older architectures, and some are spilled; and sm_75
  // has 64 KB of shared memory.
  static constexpr int kLeastCapability =
      kSums > 160 ? 90 : shared_bytes(1, false) > 64 * 1024 ? 80 : M::kLeastCapability;

  static constexpr uint32_t kOutside = 0xffffffffu;  // a voxel of the halo outside the volume
  // Positions have 14 bits, the class of the entry above them.
  static constexpr uint32_t kNowhere = 0x3fff, kClassShift = 14;  // an entry that stands for no voxel
  static_assert(kHaloHeight * kPitch < kNowhere, "positions have 14 bits");

  // Entries in use.
  static TUCKER_DEVICE int table_of(const Params& p) { return per_class(p.factor[1], p.factor[2]) * p.factor[1] * p.factor[2]; }

  static TUCKER_DEVICE int position_of(int h, int w) {
    return h * kPitch + (kStride == 1 ? w : (w & 1) * kHalf + (w >> 1));
  }

  // Which voxel of an input plane each entry stands for, which one of a coarse source's, and its position in a plane of t.
  static TUCKER_DEVICE void fill_table(const Params& p, int h0, int w0) {
    const int each = per_class(p.factor[1], p.factor[2]), table = table_of(p);
    for (int i = thread_index(); i < table; i += kThreads) {
      const int c = i / each, rest = i % each;
      const int class_h = c / p.factor[2], class_w = c % p.factor[2];
      // The halo's first row and column of this class; h0 and w0 may be negative.
      const int from_h = (class_h - h0 % p.factor[1] + p.factor[1]) % p.factor[1];
      const int from_w = (class_w - w0 % p.factor[2] + p.factor[2]) % p.factor[2];
      const int columns = (kHaloWidth - from_w + p.factor[2] - 1) / p.factor[2];
      const int h = from_h + rest / columns * p.factor[1], w = from_w + rest % columns * p.factor[2];
      const bool inside = h0 + h >= 0 && h0 + h < p.in[1] && w0 + w >= 0 && w0 + w < p.in[2];
      const bool real = h < kHaloHeight;
      const int at_h = h0 + h, at_w = w0 + w;
      shared_store4(shared_base() + kVoxelsAt + i * 4, real && inside ? static_cast<uint32_t>(at_h * p.in[2] + at_w) : kOutside);
      const int coarse = at_h / p.factor[1] * (p.in[2] / p.factor[2]) + at_w / p.factor[2];
      shared_store4(shared_base() + kCoarseAt + i * 4, real && inside ? static_cast<uint32_t>(coarse) : kOutside);
      shared_store2(shared_base() + kPositionsAt + i * 2, static_cast<uint16_t>((real ? position_of(h, w) : kNowhere) | c << kClassShift));
    }
  }

  // Where the core's weight [out, in, kd, tap] lies as a fragment.
  static TUCKER_DEVICE uint32_t weight_at(int out, int in, int kd, int tap) {
    const int step_in = in / M::kStep, k = in % M::kStep, step_out = out / M::kStep, column = out % M::kStep;
    constexpr int kQuarter = M::kStep / 4;
    const int g = column / kQuarter * 2 + column % 2, tile = column % kQuarter / 2;
    int q, byte;
    if constexpr (M::kSize == 2) {
      q = k % 8 / 2;
      byte = k / 8 * 4 + k % 2 * 2;
    } else {
      q = k % 4;
      byte = k / 4 * 4;
    }
    return (((tap * kStepsIn + step_in) * kDepth + kd) * kTilesOut + step_out * M::kStepTiles + tile) * kFragment + (g * 4 + q) * 8 + byte;
  }

  static TUCKER_DEVICE void store_weight(uint32_t at, Element value) {
    if constexpr (M::kSize == 2)
      shared_store2(at, value);
    else
      shared_store4(at, as_word(value));
  }

  static TUCKER_DEVICE void fill_weights(const Params& p) {
    // Dividing by a number that the compiler knows takes far fewer instructions.
    if (p.rank_in == kStepsIn * M::kStep)
      fill_weights_of(p, [](int pair) { return pair / (kStepsIn * M::kStep); });
    else
      fill_weights_of(p, [&p](int pair) { return pair / p.rank_in; });
  }

  template <class Divide>
  static TUCKER_DEVICE void fill_weights_of(const Params& p, const Divide& by_rank_in) {
    if (p.rank_in < kStepsIn * M::kStep || p.rank_out < kStepsOut * M::kStep) {
      for (int i = thread_index(); i < kWeights / 8; i += kThreads) shared_store8(shared_base() + kWeightsAt + i * 8, 0, 0);
      barrier();
    }
    constexpr int kPerPair = kDepth * kPlaneTaps, kOnce = M::kChunk;
    const int total = p.rank_out * p.rank_in * kPerPair;
    const auto* core = static_cast<const Element*>(p.core);
    const bool vectors = total % kOnce == 0 && reinterpret_cast<uintptr_t>(core) % 16 == 0;
    TUCKER_NO_UNROLL
    for (int i = thread_index() * kOnce; i < total; i += kThreads * kOnce) {
      Words4 words = {};
      if (vectors) words = load16(core + i);
      TUCKER_UNROLL
      for (int j = 0; j < kOnce; ++j) {
        if (i + j >= total) break;
        const int pair = (i + j) / kPerPair, tap = (i + j) % kPerPair;
        Element value;
        if (!vectors)
          value = load(core + i + j);
        else if constexpr (M::kSize == 2)
          value = static_cast<Element>(words.v[j / 2] >> (j % 2 * 16));
        else
          value = as_float(words.v[j]);
        const int out = by_rank_in(pair), in = pair - out * p.rank_in;
        store_weight(shared_base() + kWeightsAt + weight_at(out, in, tap / kPlaneTaps, tap % kPlaneTaps), value);
      }
    }
  }

  // The plane of a source that input plane d reads.
  static TUCKER_DEVICE const Element* plane_of(const Source& source, int n, int d, const int (&factor)[3]) {
    if (source.coarse) d >>= factor[0] - 1;
    const int64_t voxel = (static_cast<int64_t>(n) * source.extent[0] + d) * source.extent[1] * source.extent[2];
    return static_cast<const Element*>(source.x) + voxel * source.spacing;
  }

  // t of input plane d into a buffer.
  static TUCKER_DEVICE void reduce(const Params& p, int n, int d, uint32_t buffer) {
    const int warp = thread_index() / 32, lane = thread_index() % 32, g = lane / 4, q = lane % 4;
    const int table = table_of(p);
    TUCKER_NO_UNROLL
    for (int first = warp * kEntry; first < table; first += kWarps * kEntry) {
      float t[kBatch][kTilesIn][4] = {};
      bool outside[kBatch][2];
      TUCKER_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        TUCKER_UNROLL
        for (int r = 0; r < 2; ++r) outside[u][r] = shared_load4(shared_base() + kVoxelsAt + (first + u * 16 + g + 8 * r) * 4) == kOutside;
      }
      TUCKER_NO_UNROLL
      for (int s = 0; s < p.sources; ++s) {
        const Source& source = p.source[s];
        const auto* weight = static_cast<const Element*>(source.weight);
        uint32_t voxels = shared_base() + kVoxelsAt;
        if (source.coarse) {
          voxels = shared_base() + kCoarseAt;
          const int in_plane = shared_load2(shared_base() + kPositionsAt + first * 2) >> kClassShift;
          weight += ((d & (p.factor[0] - 1)) * p.factor[1] * p.factor[2] + in_plane) * source.tap_stride;
        }
        const Element* plane = plane_of(source, n, d, p.factor);
        uint32_t voxel[kBatch][2];
        TUCKER_UNROLL
        for (int u = 0; u < kBatch; ++u) {
          TUCKER_UNROLL
          for (int r = 0; r < 2; ++r) voxel[u][r] = shared_load4(voxels + (first + u * 16 + g + 8 * r) * 4);
        }
        TUCKER_NO_UNROLL
        for (int group = 0; group < source.channels; group += M::kGroup) {
          const int channel = group + M::kGroup / 4 * q;
          const bool inside = channel < source.channels;
          Words4 x[kBatch][2] = {};
          TUCKER_UNROLL
          for (int u = 0; u < kBatch; ++u) {
            TUCKER_UNROLL
            for (int r = 0; r < 2; ++r) {
              if (inside && !outside[u][r]) x[u][r] = load16(plane + static_cast<int64_t>(voxel[u][r]) * source.spacing + channel);
            }
          }
          if (Activation<M, true>::wanted(source)) {
            const Activation<M, true> activation(source, n, channel);
            TUCKER_UNROLL
            for (int u = 0; u < kBatch; ++u) {
              TUCKER_UNROLL
              for (int r = 0; r < 2; ++r) {
                if (!outside[u][r]) activation.apply(x[u][r]);
              }
            }
          }
          TUCKER_UNROLL
          for (int tile = 0; tile < kTilesIn; ++tile) {
            const int rank = tile / M::kStepTiles * M::kStep + channel_of<M>(M::kStep, tile % M::kStepTiles, g);
            Words4 column = {};
            if (inside && rank < p.rank_in) column = load16(weight + static_cast<int64_t>(rank) * source.pitch + channel);
            TUCKER_UNROLL
            for (int u = 0; u < kBatch; ++u) multiply_group<M>(t[u][tile], x[u][0], x[u][1], column);
          }
        }
      }
      if (p.in_bias) {
        TUCKER_UNROLL
        for (int tile = 0; tile < kTilesIn; ++tile) {
          TUCKER_UNROLL
          for (int e = 0; e < 2; ++e) {
            const int rank = tile / M::kStepTiles * M::kStep + channel_of<M>(M::kStep, tile % M::kStepTiles, 2 * q + e);
            const float bias = rank < p.rank_in ? value_of<M>(load(static_cast<const Element*>(p.in_bias) + rank)) : 0.0f;
            TUCKER_UNROLL
            for (int u = 0; u < kBatch; ++u) {
              TUCKER_UNROLL
              for (int r = 0; r < 2; ++r) {
                if (!outside[u][r]) t[u][tile][2 * r + e] += bias;
              }
            }
          }
        }
      }
      TUCKER_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        TUCKER_UNROLL
        for (int step = 0; step < kStepsIn; ++step) {
          uint32_t factor[4];
          to_factor<M>(&t[u][step * M::kStepTiles], factor);
          TUCKER_UNROLL
          for (int r = 0; r < 2; ++r) {
            const uint32_t position = shared_load2(shared_base() + kPositionsAt + (first + u * 16 + g + 8 * r) * 2) & kNowhere;
            if (position != kNowhere)
              shared_store8(buffer + (2 * step + (q >> 1)) * kPlane + position * 16 + (q & 1) * 8, factor[r], factor[2 + r]);
          }
        }
      }
    }
  }

  // Brings the next input plane closer while this one is multiplied.
  static TUCKER_DEVICE void prefetch_plane(const Params& p, int n, int d) {
    const int table = table_of(p);
    for (int s = 0; s < p.sources; ++s) {
      const Source& source = p.source[s];
      const Element* plane = plane_of(source, n, d, p.factor);
      for (int i = thread_index(); i < table; i += kThreads) {
        const uint32_t voxel = shared_load4((source.coarse ? (shared_base() + kCoarseAt) : (shared_base() + kVoxelsAt)) + i * 4);
        if (voxel == kOutside) continue;
        for (int channel = 0; channel < source.channels; channel += 128 / M::kSize)
          prefetch(plane + static_cast<int64_t>(voxel) * source.spacing + channel);
      }
    }
  }

  using Sums = float[kRows][kTilesOut][4];

  // What the plane of t in `buffer` adds to kCount slots: slot s takes the kernel's plane kFirst - s · kBy. Those that
  // `wanted` has no bit for are left out, unless kAll says that there are none.
  template <int kCount, int kFirst, int kBy, bool kAll>
  static TUCKER_DEVICE void convolve(Sums (&z)[kCount], uint32_t buffer, int wanted) {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    uint32_t row = buffer + (lane / 16) * kPlane + (warp * (kRows / kAcross) * kStride * kPitch + lane % 16) * 16;
    uint32_t weights = shared_base() + kWeightsAt + lane * 8;
    TUCKER_NO_UNROLL
    for (int tap_h = 0; tap_h < kTaps; ++tap_h) {
      TUCKER_NO_UNROLL
      for (int tap_w = 0; tap_w < kTaps; ++tap_w) {
        const uint32_t tapped = row + position_of(0, tap_w) * 16;
        TUCKER_UNROLL
        for (int step = 0; step < kStepsIn; ++step) {
          uint32_t b[kCount][kTilesOut][2];
          TUCKER_UNROLL
          for (int s = 0; s < kCount; ++s) {
            TUCKER_UNROLL
            for (int tile = 0; tile < kTilesOut; ++tile) {
              const Words2 words = shared_load8(weights + ((step * kDepth + kFirst - s * kBy) * kTilesOut + tile) * kFragment);
              b[s][tile][0] = words.v[0];
              b[s][tile][1] = words.v[1];
            }
          }
          TUCKER_UNROLL
          for (int t = 0; t < kRows; ++t) {
            uint32_t a[4];
            load_matrices(a, tapped + (t / kAcross * kStride * kPitch + t % kAcross * 16) * 16 + 2 * step * kPlane);
            TUCKER_UNROLL
            for (int s = 0; s < kCount; ++s) {
              if (!kAll && !(wanted >> s & 1)) continue;
              TUCKER_UNROLL
              for (int tile = 0; tile < kTilesOut; ++tile) M::multiply(z[s][t][tile], a, b[s][tile]);
            }
          }
        }
        weights += kStepsIn * kDepth * kTilesOut * kFragment;
      }
      row += kPitch * 16;
    }
  }

  template <int kCount, int kFirst, int kBy>
  static TUCKER_DEVICE void convolve(Sums (&z)[kCount], uint32_t buffer, int wanted) {
    if (wanted == (1 << kCount) - 1)
      convolve<kCount, kFirst, kBy, true>(z, buffer, wanted);
    else
      convolve<kCount, kFirst, kBy, false>(z, buffer, wanted);
  }

  // to = from, or 0.
  static TUCKER_DEVICE void assign(Sums& to, const Sums* from) {
    TUCKER_UNROLL
    for (int t = 0; t < kRows; ++t) {
      TUCKER_UNROLL
      for (int tile = 0; tile < kTilesOut; ++tile) {
        TUCKER_UNROLL
        for (int i = 0; i < 4; ++i) to[t][tile][i] = from ? (*from)[t][tile][i] : 0.0f;
      }
    }
  }

  // What a block computes. Asked for again where it is needed rarely: registers are short in between.
  struct Task {
    int n, h0, w0, begin, end;  // the tile's first output row and column, its output planes

    TUCKER_DEVICE explicit Task(const Params& p) {
      const int x = opaque(block_index().x), chunk = x / p.tiles[2] / p.tiles[1];
      n = block_index().y;
      w0 = x % p.tiles[2] * kWidth;
      h0 = x / p.tiles[2] % p.tiles[1] * kHeight;
      begin = chunk * p.chunk;
      end = begin + p.chunk < p.out[0] ? begin + p.chunk : p.out[0];
    }
  };

  // Where outputs of this lane lie: row r of the warp's tile t, from the first of all.
  struct Rows {
    Element* first;
    uint32_t inside;  // a bit for each
    int row, column;  // elements from one to the next

    // In the task's first output plane.
    TUCKER_DEVICE Rows(const Params& p, const Task& task) : inside(0) {
      const int warp = thread_index() / 32, g = thread_index() % 32 / 4;
      const int h0 = task.h0 + warp * (kRows / kAcross), w0 = task.w0 + g;
      const int64_t voxel = ((static_cast<int64_t>(task.n) * p.out[0] + task.begin) * p.out[1] + h0) * p.out[2] + w0;
      row = column = 0;
      for (int t = 0; t < kRows; ++t)
        for (int r = 0; r < 2; ++r)
          inside |= static_cast<uint32_t>(h0 + t / kAcross < p.out[1] && w0 + t % kAcross * 16 + 8 * r < p.out[2]) << (2 * t + r);
      first = static_cast<Element*>(p.y) + voxel * p.expansion.channels;
    }
    TUCKER_DEVICE void forget() { column = opaque(column); }
    TUCKER_DEVICE bool valid(int t, int r) const { return inside >> (2 * t + r) & 1; }
    TUCKER_DEVICE Element* pointer(int t, int r) const {
      return first + (static_cast<int64_t>(t / kAcross) * row + (t % kAcross * 16 + 8 * r) * column);
    }
  };

  // Outputs of a warp within the plane.
  static TUCKER_DEVICE int outputs(const Params& p, int h0, int w0, int warp) {
    int total = 0;
    for (int t = 0; t < kRows; ++t) {
      const int left = p.out[2] - w0 - t % kAcross * 16;
      if (h0 + warp * (kRows / kAcross) + t / kAcross < p.out[1] && left > 0) total += left < 16 ? left : 16;
    }
    return total;
  }

  static TUCKER_DEVICE void run(const Params& p) {
    // Code for an older architecture on a newer card: the choice of forms asks first, and nothing may go on unnoticed.
    if constexpr (kLeastCapability <= kCompiledFor)
      run_here(p);
    else
      give_up();
  }

  static TUCKER_DEVICE uint32_t moments_of(const Params& p, int warp) {
    const int padded = (p.expansion.channels + M::kGroup - 1) / M::kGroup * M::kGroup;
    return shared_base() + kMomentsAt + warp * padded * WarpMoments::kBytes;
  }

  static TUCKER_DEVICE void run_here(const Params& p) {
    const Task task(p);
    const int n = task.n;
    fill_table(p, task.h0 * kStride - p.padding[1], task.w0 * kStride - p.padding[2]);
    fill_weights(p);
    barrier();
    Rows rows(p, task);

    // Input planes are counted from the padding's first: output plane d reads planes d · stride and the two after it.
    Sums waiting[kWaiting > 0 ? kWaiting : 1] = {};
    const int first = task.begin * kStrideDepth, last = (task.end - 1) * kStrideDepth + kDepth - 1;
    TUCKER_NO_UNROLL
    for (int plane = first; plane <= last; ++plane) {
      const int d = plane - p.padding[0];
      const bool inside = d >= 0 && d < p.in[0];
      const uint32_t buffer = shared_base() + (plane & 1) * kBuffer;
      if (inside) {
        reduce(p, n, d, buffer);
        barrier();
        if (plane < last && d + 1 < p.in[0]) prefetch_plane(p, n, d + 1);
      }
      if (kStrideDepth == 2 && plane % 2 == 1) {
        // Kernel plane 1 of the one output plane that waits.
        if (inside) convolve<1, 1, 1>(reinterpret_cast<Sums(&)[1]>(waiting), buffer, 1);
        continue;
      }
      Sums z[kSlots];
      TUCKER_UNROLL
      for (int s = 0; s < kSlots; ++s) assign(z[s], s < kWaiting ? &waiting[s < kWaiting ? s : 0] : nullptr);
      if (inside) {
        // Slot s holds the output plane that ends s strides later; those before the block's first and after its last are
        // left out.
        int wanted = 0;
        TUCKER_UNROLL
        for (int s = 0; s < kSlots; ++s) {
          const int ends = plane + s * kStrideDepth;
          wanted |= (ends >= first + kDepth - 1 && ends <= last) << s;
        }
        convolve<kSlots, kDepth - 1, kStrideDepth>(z, buffer, wanted);
      }
      TUCKER_UNROLL
      for (int s = 0; s < kWaiting; ++s) assign(waiting[s], &z[s + 1]);
      if (plane < first + kDepth - 1) continue;
      uint32_t factor[kRows][kStepsOut][4];
      TUCKER_UNROLL
      for (int t = 0; t < kRows; ++t) {
        TUCKER_UNROLL
        for (int step = 0; step < kStepsOut; ++step) to_factor<M>(&z[0][t][step * M::kStepTiles], factor[t][step]);
      }
      rows.column = p.expansion.channels;
      rows.row = p.out[2] * rows.column;
      expand<M>(factor, p.expansion, rows, WarpMoments{moments_of(p, opaque(thread_index()) / 32), p.moments != nullptr, plane == first + kDepth - 1});
      rows.first += static_cast<int64_t>(p.out[1]) * p.out[2] * p.expansion.channels;
    }
    if (p.moments) store_moments(p);
  }

  static TUCKER_DEVICE void store_moments(const Params& p) {
    barrier();
    const Task task(p);
    const int blocks = p.tiles[0] * p.tiles[1] * p.tiles[2];
    for (int c = thread_index(); c < p.expansion.channels; c += kThreads) {
      Moments all{0.0f, 0.0f, 0.0f};
      for (int warp = 0; warp < kWarps; ++warp) {
        const WarpMoments moments{moments_of(p, warp), true, false};
        const float count = static_cast<float>(outputs(p, task.h0, task.w0, warp) * (task.end - task.begin));
        if (count == 0.0f) continue;
        const float sum = as_float(shared_load4(moments.at(c, 1))), share = sum / count;
        const float m2 = as_float(shared_load4(moments.at(c, 2))) - sum * share;
        all = merged(all, {count, as_float(shared_load4(moments.at(c, 0))) + share, m2 < 0.0f ? 0.0f : m2});
      }
      store(p.moments + (static_cast<int64_t>(task.n) * blocks + block_index().x) * p.expansion.channels + c, all);
    }
  }
};

}  // namespace tucker_ops::cuda
