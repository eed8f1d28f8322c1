#include "weights.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <list>
#include <mutex>
#include <optional>

namespace tucker_ops::cpu {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kMinPackedPerThread = 20'000;
constexpr int64_t kMinComparedPerThread = 256 * 1024;
// A compressed 3D nnU-Net needs 10 to 60 MB; the forms used longest ago are dropped first.
constexpr int64_t kMostCachedBytes = 256 * 1024 * 1024;
constexpr int64_t kSamples = 16;

// G of F(2, 3) and F(4, 3), matching winograd.inl.
constexpr double kG2[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
constexpr double kG4[6][3] = {{1.0 / 4, 0, 0},
                              {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                              {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                              {1.0 / 24, 1.0 / 12, 1.0 / 6},
                              {1.0 / 24, -1.0 / 12, 1.0 / 6},
                              {0, 0, 1}};

float value_at(const WeightView& weight, int64_t offset) {
  if (weight.is_float) return static_cast<const float*>(weight.data)[offset];
  const uint32_t wide = static_cast<uint32_t>(static_cast<const uint16_t*>(weight.data)[offset]) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

int64_t element_bytes(const WeightView& weight) { return weight.is_float ? 4 : 2; }

int64_t bytes_of(const WeightView& weight) {
  int64_t bytes = element_bytes(weight);
  for (int64_t size : weight.sizes) bytes *= size;
  return bytes;
}

// Offsets of the two channels of a unit; the second is -1 in a unit of one, or where there is none.
struct Unit {
  int64_t first, second;
};

// Units over which an output channel is summed: the axes `taps`, then axis 1, which holds the channels.
std::vector<Unit> reduction_units(const WeightView& weight, const std::vector<size_t>& taps, int64_t channels) {
  std::vector<int64_t> offsets{0};
  for (size_t axis : taps) {
    std::vector<int64_t> next;
    next.reserve(offsets.size() * weight.sizes[axis]);
    for (int64_t offset : offsets)
      for (int64_t i = 0; i < weight.sizes[axis]; ++i) next.push_back(offset + i * weight.strides[axis]);
    offsets.swap(next);
  }
  const int64_t count = weight.sizes[1], stride = weight.strides[1];
  std::vector<Unit> units;
  units.reserve(offsets.size() * ceil_div(count, channels));
  for (int64_t offset : offsets)
    for (int64_t c = 0; c < count; c += channels)
      units.push_back({offset + c * stride, channels == 2 && c + 1 < count ? offset + (c + 1) * stride : -1});
  return units;
}

// A unit as the kernels read it: a float, or two bfloat16 in its 32 bits.
float unit_at(const WeightView& weight, int64_t origin, const Unit& unit, int64_t channels) {
  if (channels == 1) return value_at(weight, origin + unit.first);
  const auto* data = static_cast<const uint16_t*>(weight.data) + origin;
  const uint32_t bits = data[unit.first] | (unit.second < 0 ? 0u : static_cast<uint32_t>(data[unit.second]) << 16);
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Calls f(first channel, channels that exist, channels of the block, reduction begin, end) in parallel over
// blocks of 2·lanes channels and runs of the reduction.
template <class F>
void for_each_block(int64_t channels, int64_t reduction, int64_t lanes, const F& f) {
  const int64_t block = 2 * lanes, blocks = ceil_div(channels, block);
  torch::stable::parallel_for(0, blocks * reduction, ceil_div(kMinPackedPerThread, block),
                              [&](int64_t begin, int64_t end) {
                                while (begin < end) {
                                  const int64_t b = begin / reduction, first = begin % reduction;
                                  const int64_t last = std::min(reduction, first + end - begin);
                                  const int64_t count = std::min(block, channels - b * block);
                                  f(b * block, count, count > lanes ? block : lanes, first, last);
                                  begin += last - first;
                                }
                              });
}

void pack_into(float* packed, const WeightView& weight, const std::vector<size_t>& taps, const Units& u) {
  const std::vector<Unit> units = reduction_units(weight, taps, u.channels);
  const int64_t channels = weight.sizes[0], reduction = units.size(), stride = weight.strides[0];
  for_each_block(channels, reduction, u.lanes, [&](int64_t c, int64_t count, int64_t width, int64_t begin, int64_t end) {
    float* out = packed + c * reduction + begin * width;
    for (int64_t i = begin; i < end; ++i, out += width) {
      for (int64_t lane = 0; lane < count; ++lane)
        out[lane] = unit_at(weight, (c + lane) * stride, units[i], u.channels);
      std::fill(out + count, out + width, 0.0f);
    }
  });
}

Floats pack(const WeightView& weight, const std::vector<size_t>& taps, const Units& u) {
  int64_t reduction = ceil_div(weight.sizes[1], u.channels);
  for (size_t axis : taps) reduction *= weight.sizes[axis];
  Floats packed = allocate(packed_floats(weight.sizes[0], reduction, u.lanes));
  if (packed) pack_into(packed.get(), weight, taps, u);
  return packed;
}

// One matrix, or one for each position of axis 0, reduce_floats apart.
Floats pack_reduce(const WeightView& weight, const Units& u) {
  if (weight.sizes.size() == 2) return pack(weight, {}, u);
  WeightView matrix{weight.data, weight.is_float, {weight.sizes[1], weight.sizes[2]}, {weight.strides[1], weight.strides[2]}};
  const int64_t floats = reduce_floats(weight, u);
  Floats packed = allocate(weight.sizes[0] * floats);
  if (!packed) return packed;
  for (int64_t i = 0; i < weight.sizes[0]; ++i) {
    matrix.data = static_cast<const char*>(weight.data) + i * weight.strides[0] * element_bytes(weight);
    pack_into(packed.get() + i * floats, matrix, {}, u);
  }
  return packed;
}

Floats pack_vector(const WeightView& vector, const Units& u) {
  const int64_t channels = ceil_div(vector.sizes[0], 2 * u.lanes) * 2 * u.lanes;
  Floats packed = allocate(channels);
  if (!packed) return packed;
  std::fill_n(packed.get(), channels, 0.0f);
  for (int64_t c = 0; c < vector.sizes[0]; ++c) packed[c] = value_at(vector, c * vector.strides[0]);
  return packed;
}

// U = G g Gᵀ of every 3 × 3 slice of the core, computed in float64: one packed core per point.
template <int P>
Floats pack_winograd(const WeightView& core, const double (&G)[P][3], int64_t lanes) {
  const size_t height = core.sizes.size() - 2, width_axis = height + 1;
  const std::vector<Unit> units = reduction_units(core, height == 3 ? std::vector<size_t>{2} : std::vector<size_t>{}, 1);
  const int64_t channels = core.sizes[0], reduction = units.size();
  const int64_t point_floats = packed_floats(channels, reduction, lanes);
  Floats packed = allocate(P * P * point_floats);
  if (!packed) return packed;
  for_each_block(channels, reduction, lanes, [&](int64_t c, int64_t count, int64_t width, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t lane = 0; lane < width; ++lane) {
        float* out = packed.get() + c * reduction + i * width + lane;
        if (lane >= count) {
          for (int point = 0; point < P * P; ++point) out[point * point_floats] = 0.0f;
          continue;
        }
        const int64_t origin = (c + lane) * core.strides[0] + units[i].first;
        double half[P][3];
        for (int k = 0; k < 3; ++k) {
          double g[3];
          for (int h = 0; h < 3; ++h)
            g[h] = value_at(core, origin + h * core.strides[height] + k * core.strides[width_axis]);
          for (int a = 0; a < P; ++a) half[a][k] = G[a][0] * g[0] + G[a][1] * g[1] + G[a][2] * g[2];
        }
        for (int a = 0; a < P; ++a)
          for (int b = 0; b < P; ++b)
            out[(a * P + b) * point_floats] =
                static_cast<float>(half[a][0] * G[b][0] + half[a][1] * G[b][1] + half[a][2] * G[b][2]);
      }
    }
  });
  return packed;
}

Floats pack_core(const WeightView& core, const Units& u, int64_t winograd) {
  if (winograd == 2) return pack_winograd(core, kG2, u.lanes);
  if (winograd == 4) return pack_winograd(core, kG4, u.lanes);
  std::vector<size_t> taps;
  for (size_t axis = 2; axis < core.sizes.size(); ++axis) taps.push_back(axis);
  return pack(core, taps, u);
}

std::optional<PackedWeights> pack_all(const Weights& weights, const Units& u, int64_t winograd) {
  PackedWeights packed;
  bool complete = true;
  auto keep = [&](Floats floats) {
    complete = complete && floats;
    return floats;
  };
  for (const auto& matrix : weights.reduce) packed.reduce.push_back(matrix ? keep(pack_reduce(*matrix, u)) : Floats());
  for (const auto& matrix : weights.expand) packed.expand.push_back(matrix ? keep(pack(*matrix, {}, u)) : Floats());
  if (weights.core) packed.core = keep(pack_core(*weights.core, u, winograd));
  if (weights.u_out) packed.u_out = keep(pack(*weights.u_out, {}, u));
  if (weights.in_bias) packed.in_bias = keep(pack_vector(*weights.in_bias, u));
  const int64_t out_channels = weights.u_out ? weights.u_out->sizes[0] : weights.core->sizes[0];
  const std::vector<float> zeros(weights.bias ? 0 : out_channels);
  packed.bias = keep(pack_vector(weights.bias ? *weights.bias : WeightView{zeros.data(), true, {out_channels}, {1}}, u));
  if (!complete) return std::nullopt;
  return packed;
}

// Do the elements, in whatever order, fill one run of memory?
bool is_dense(const WeightView& weight) {
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (size_t i = 0; i < weight.sizes.size(); ++i)
    if (weight.sizes[i] != 1) axes.emplace_back(weight.strides[i], weight.sizes[i]);
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

std::vector<const WeightView*> views(const Weights& weights) {
  std::vector<const WeightView*> all;
  for (const auto& matrix : weights.reduce)
    if (matrix) all.push_back(&*matrix);
  for (const auto* optional : {&weights.core, &weights.u_out, &weights.in_bias, &weights.bias})
    if (*optional) all.push_back(&**optional);
  for (const auto& matrix : weights.expand)
    if (matrix) all.push_back(&*matrix);
  return all;
}

// What a packed form depends on besides the values.
std::vector<int64_t> form_of(const Weights& weights, const Units& u, int64_t winograd) {
  std::vector<int64_t> form{u.lanes, u.channels, winograd, static_cast<int64_t>(weights.reduce.size()),
                            weights.core.has_value(), weights.u_out.has_value(), weights.in_bias.has_value(), weights.bias.has_value()};
  for (const auto* matrices : {&weights.reduce, &weights.expand})
    for (const auto& matrix : *matrices) form.push_back(matrix.has_value());
  for (const WeightView* view : views(weights)) {
    form.push_back(view->is_float);
    form.push_back(view->sizes.size());
    for (size_t i = 0; i < view->sizes.size(); ++i) {
      form.push_back(view->sizes[i]);
      form.push_back(view->sizes[i] == 1 ? 0 : view->strides[i]);
    }
  }
  return form;
}

struct Entry {
  uint64_t key;
  std::vector<int64_t> form;
  std::vector<std::unique_ptr<char[]>> originals;
  PackedWeights packed;
  int64_t bytes;
};

// Of the form and a few of the values: equal for equal weights, wherever they lie.
uint64_t key_of(const Weights& weights, const std::vector<int64_t>& form) {
  uint64_t hash = 14695981039346656037u;
  auto mix = [&](uint64_t value) { hash = (hash ^ value) * 1099511628211u; };
  for (int64_t value : form) mix(value);
  for (const WeightView* view : views(weights)) {
    const int64_t bytes = bytes_of(*view), element = element_bytes(*view), count = bytes / element;
    for (int64_t i = 0; i < kSamples; ++i) {
      uint32_t sample = 0;
      std::memcpy(&sample, static_cast<const char*>(view->data) + i * (count - 1) / (kSamples - 1) * element, element);
      mix(sample);
    }
  }
  return hash;
}

bool same_bytes(const void* a, const void* b, int64_t bytes) {
  if (bytes < 2 * kMinComparedPerThread) return !std::memcmp(a, b, bytes);
  std::atomic<bool> same{true};
  torch::stable::parallel_for(0, bytes, kMinComparedPerThread, [&](int64_t begin, int64_t end) {
    if (std::memcmp(static_cast<const char*>(a) + begin, static_cast<const char*>(b) + begin, end - begin))
      same = false;
  });
  return same;
}

bool belongs_to(const Entry& entry, const Weights& weights, const std::vector<int64_t>& form) {
  if (entry.form != form) return false;
  const auto all = views(weights);
  for (size_t i = 0; i < all.size(); ++i)
    if (!same_bytes(entry.originals[i].get(), all[i]->data, bytes_of(*all[i]))) return false;
  return true;
}

// Newest use first. Never waits for its lock, so a child forked while another thread held it only loses speed.
class Cache {
 public:
  std::shared_ptr<const Entry> find(uint64_t key) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    const auto found = std::find_if(entries_.begin(), entries_.end(), [&](auto& entry) { return entry->key == key; });
    if (found == entries_.end()) return nullptr;
    entries_.splice(entries_.begin(), entries_, found);
    return entries_.front();
  }

  void put(std::shared_ptr<const Entry> entry) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || entry->bytes > kMostCachedBytes) return;
    entries_.remove_if([&](auto& old) {
      if (old->key != entry->key) return false;
      bytes_ -= old->bytes;
      return true;
    });
    bytes_ += entry->bytes;
    entries_.push_front(std::move(entry));
    while (bytes_ > kMostCachedBytes) {
      bytes_ -= entries_.back()->bytes;
      entries_.pop_back();
    }
  }

 private:
  std::mutex mutex_;
  std::list<std::shared_ptr<const Entry>> entries_;
  int64_t bytes_ = 0;
};

Cache& cache() {
  // Never destroyed: threads may still compute while the process ends.
  static Cache& instance = *new Cache;
  return instance;
}

// An upper bound, pairs not counted.
int64_t packed_bytes(const Weights& weights, int64_t lanes, int64_t winograd) {
  int64_t floats = 0;
  if (weights.core) {
    int64_t reduction = 1;
    for (size_t axis = 1; axis < weights.core->sizes.size(); ++axis) reduction *= weights.core->sizes[axis];
    if (winograd) reduction = reduction / 9 * (winograd + 2) * (winograd + 2);
    floats += packed_floats(weights.core->sizes[0], reduction + 1, lanes);
  }
  for (const auto& matrix : weights.reduce) {
    if (!matrix) continue;
    const size_t rows = matrix->sizes.size() - 2;
    floats += (rows ? matrix->sizes[0] : 1) * packed_floats(matrix->sizes[rows], matrix->sizes[rows + 1] + 1, lanes);
  }
  if (weights.u_out) floats += packed_floats(weights.u_out->sizes[0], weights.u_out->sizes[1] + 1, lanes);
  for (const auto& matrix : weights.expand)
    if (matrix) floats += packed_floats(matrix->sizes[0], matrix->sizes[1], lanes);
  return 4 * floats;
}

}  // namespace

int64_t reduce_floats(const WeightView& matrix, const Units& units) {
  const size_t rows = matrix.sizes.size() - 2;
  return packed_floats(matrix.sizes[rows], ceil_div(matrix.sizes[rows + 1], units.channels), units.lanes);
}

Floats allocate(int64_t count) {
  const int64_t bytes = ceil_div(count * static_cast<int64_t>(sizeof(float)), kAlignment) * kAlignment;
  return Floats(static_cast<float*>(std::aligned_alloc(kAlignment, std::max(bytes, kAlignment))));
}

std::shared_ptr<const PackedWeights> packed_weights(const Weights& weights, const Units& units, int64_t winograd) {
  const auto all = views(weights);
  const bool keep = std::all_of(all.begin(), all.end(), [](const WeightView* view) { return is_dense(*view); });
  std::vector<int64_t> form = form_of(weights, units, winograd);
  const uint64_t key = keep ? key_of(weights, form) : 0;
  if (keep) {
    if (const auto entry = cache().find(key); entry && belongs_to(*entry, weights, form))
      return {entry, &entry->packed};
  }
  std::optional<PackedWeights> packed = pack_all(weights, units, winograd);
  if (!packed) return nullptr;
  auto entry = std::make_shared<Entry>();
  entry->key = key;
  entry->form = std::move(form);
  entry->packed = std::move(*packed);
  entry->bytes = packed_bytes(weights, units.lanes, winograd);
  if (keep) {
    for (const WeightView* view : all) {
      const int64_t bytes = bytes_of(*view);
      entry->originals.push_back(std::make_unique<char[]>(bytes));
      std::memcpy(entry->originals.back().get(), view->data, bytes);
      entry->bytes += bytes;
    }
    cache().put(entry);
  }
  return {entry, &entry->packed};
}

}  // namespace tucker_ops::cpu
