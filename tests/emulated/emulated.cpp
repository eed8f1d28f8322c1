// Runs the CPU kernels on random problems against float64, without torch, as a static program that needs little of its
// operating system: machine.cpp is enough of one for an emulated processor.
//
//   emulated EVERY ISA...
//
// computes every EVERY-th problem with the kernels named. Errors are printed as shares of what tests/ops allows; equal
// "bits" of two runs mean equal results.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "execute.h"
#include "isa.h"
#include "torch/csrc/stable/ops.h"

using namespace tucker_ops;
using namespace tucker_ops::cpu;

int64_t tucker_matrix_stores = 0;  // counted by matrix.inl

namespace {

using Values = std::vector<double>;

// Memory that ends where a page begins that faults, filled with NaN: reading past an end, or what nobody wrote, shows.
std::map<void*, std::pair<void*, size_t>>& mappings() {
  static auto& all = *new std::map<void*, std::pair<void*, size_t>>;
  return all;
}

void* guarded(size_t bytes) {
  constexpr size_t page = 4096;
  const size_t pages = (bytes + page - 1) / page * page;
  void* base = mmap(nullptr, pages + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) std::abort();
  char* const inside = static_cast<char*>(base) + page;
  mprotect(base, page, PROT_NONE);
  mprotect(inside + pages, page, PROT_NONE);
  std::memset(inside, 0xff, pages);
  char* const data = inside + pages - bytes;
  mappings()[data] = {base, pages + 2 * page};
  return data;
}

bool release(void* data) {
  const auto found = mappings().find(data);
  if (found == mappings().end()) return false;
  munmap(found->second.first, found->second.second);
  mappings().erase(found);
  return true;
}

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return next() % n; }
  bool chance(int percent) { return below(100) < percent; }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[below(values.size())];
  }
  // About normal, a multiple of 2^-15: the same bits wherever this runs.
  float normal() {
    const uint64_t bits = next();
    int64_t sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<int64_t>(bits >> 16 * i & 0xffff) - 0x8000;
    return static_cast<float>(sum) * (1.0f / 32768);
  }
};

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Matrices are [in][out], behind the axes that choose one of them.
struct Input {
  int64_t channels = 1, width = 1, factor[3] = {1, 1, 1}, extent[3] = {1, 1, 1};
  bool reduced = true;           // by a matrix
  int64_t rows = 0, offset = 0;  // what it makes of the core's channels
  int64_t layout = 0;  // 0: channels last; 1: contiguous; 2: height and width exchanged; 3: rows with a gap
  double slope = 1;
  Values x;  // [batch][voxel][width]
  Values expand, scale, shift, reduce;

  int64_t positions() const { return factor[0] * factor[1] * factor[2]; }
  int64_t voxels() const { return extent[0] * extent[1] * extent[2]; }
};

enum Family { kConv, kBlock, kMatrix, kFamilies };
const char* const kNames[] = {"conv", "block", "matrix"};
constexpr int kCases[] = {160, 300, 140};

struct Problem {
  Family family = kConv;
  int number = 0;
  bool bfloat16 = false;
  Geometry g{};
  std::vector<Input> inputs;
  Values core, u_out, bias, in_bias;
  bool float_values = false, contiguous = false, statistics = false, nan = false;
  int64_t threads = 1;
  const char* way = "";  // TUCKER_CPU_CORE

  int64_t taps() const { return g.kernel[0] * g.kernel[1] * g.kernel[2]; }
  int64_t voxels() const { return g.out[0] * g.out[1] * g.out[2]; }
  int64_t values() const { return g.batch * g.out_channels * voxels(); }
  std::string text() const {
    std::string text = std::string(kNames[family]) + " " + std::to_string(number) + (bfloat16 ? " bf16" : " fp32");
    auto add = [&](const char* name, const std::vector<int64_t>& numbers) {
      text.append(", ").append(name);
      for (int64_t value : numbers) text.append(" ").append(std::to_string(value));
    };
    add("batch and channels", {g.batch, g.in_channels, g.rank_in, g.rank_out, g.out_channels});
    // In the order of Geometry.
    add("in out kernel stride padding dilation", {g.in, g.in + 18});
    for (const Input& s : inputs) {
      add(s.expand.empty() ? "source of" : "expanded source of", {s.factor, s.factor + 3});
      add("reduced rows offset", {s.reduced, s.rows, s.offset});
    }
    add("convolved expanded", {g.convolved, g.expanded});
    add("bias in_bias", {!bias.empty(), !in_bias.empty()});
    add("statistics covariance", {statistics, g.covariance});
    add("float_values contiguous nan threads", {float_values, contiguous, nan, threads});
    return text + " " + way;
  }
};

// Draws a shape; false where the kernel does not fit or there is too much to compute.
bool choose(Problem& p, Random& r) {
  Geometry& g = p.g;
  const bool block = p.family == kBlock || (p.family == kMatrix && r.chance(50));
  static const int64_t kernels[][3] = {{3, 3, 3}, {1, 3, 3}, {3, 3, 1}, {5, 5, 5}, {1, 1, 1}, {2, 3, 5}, {3, 1, 1}};
  static const int64_t strides[][3] = {{1, 1, 1}, {1, 1, 1}, {2, 2, 2}, {3, 3, 3}, {1, 2, 2}, {2, 1, 3}};
  const int64_t *kernel = kernels[r.below(7)], *stride = strides[r.below(6)];
  for (int axis = 0; axis < 3; ++axis) {
    g.in[axis] = block ? r.one_of<int64_t>({1, 2, 4, 6, 9, 10, 14}) : r.one_of<int64_t>({1, 2, 3, 5, 7, 8, 13, 17});
    g.kernel[axis] = kernel[axis];
    g.stride[axis] = stride[axis];
    g.padding[axis] = r.below(4);
    g.dilation[axis] = r.one_of<int64_t>({1, 1, 1, 2, 3});
  }
  g.batch = r.one_of<int64_t>({1, 1, 1, 2, 3});
  auto channels = [&] { return r.one_of<int64_t>({1, 3, 4, 8, 9, 16, 17, 24, 33, 40}); };
  g.rank_in = channels();
  g.rank_out = channels();
  g.out_channels = channels();
  p.way = r.one_of<const char*>({"", "direct", "winograd2", "winograd4"});
  if (p.family == kMatrix) {
    // Rows of more than one and two registers of voxels, ranks that fill whole registers.
    p.way = "direct";
    g.in[2] = r.one_of<int64_t>({8, 15, 16, 17, 23, 31, 32, 33, 40, 49, 65});
    g.rank_in = r.one_of<int64_t>({7, 8, 15, 16, 23, 24, 31, 32, 40, 48, 64, 72});
    g.rank_out = r.one_of<int64_t>({5, 16, 17, 32, 33, 48, 50, 64});
    g.stride[2] = r.one_of<int64_t>({1, 1, 2, 2, 3});
    p.nan = r.chance(20);
  }
  if (*p.way == 'w')
    for (int axis : {1, 2}) g.kernel[axis] = 3, g.stride[axis] = g.dilation[axis] = 1;
  if (r.chance(33)) g.in[0] = g.kernel[0] = g.stride[0] = g.dilation[0] = 1, g.padding[0] = 0;
  const bool reduced = !block || r.chance(80);
  const int64_t count = block && reduced ? r.one_of<int64_t>({1, 1, 2, 3, 4}) : 1;
  const bool side_by_side = count > 1 && r.chance(40);
  std::vector<int64_t> rows(count);
  if (side_by_side) {
    g.rank_in = 0;
    for (int64_t i = 0; i < count; ++i) g.rank_in += rows[i] = i + 1 < count ? kMostLanes : channels();
  } else {
    std::fill(rows.begin(), rows.end(), g.rank_in);
  }
  if (block && r.chance(10)) {
    g.convolved = false;
    g.rank_out = g.rank_in;
    for (int axis = 0; axis < 3; ++axis) g.kernel[axis] = g.stride[axis] = 1, g.padding[axis] = 0;
  }
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t room = g.in[axis] + 2 * g.padding[axis] - g.dilation[axis] * (g.kernel[axis] - 1) - 1;
    if (room < 0) return false;
    g.out[axis] = room / g.stride[axis] + 1;
  }
  p.threads = r.one_of<int64_t>({1, 1, 3, 16});
  p.contiguous = r.chance(40);
  p.float_values = !p.bfloat16 || r.chance(25);
  p.statistics = r.chance(block ? 70 : 20);
  if (block) {
    g.expanded = !g.convolved || r.chance(60);
    g.covariance = p.statistics && !g.expanded && r.chance(80);
    if (!g.expanded) g.out_channels = g.rank_out;
  }
  double macs = static_cast<double>(g.rank_in) * g.rank_out * p.taps() + g.rank_out * g.out_channels;
  for (int64_t i = 0; i < count; ++i) {
    Input s;
    s.rows = rows[i];
    s.offset = side_by_side ? kMostLanes * i : 0;
    s.reduced = reduced && !(side_by_side && r.chance(40));
    s.channels = s.width = s.reduced ? channels() : s.rows;
    if (block && r.chance(40)) s.width = r.one_of<int64_t>({1, 3, 8, 16, 17});
    const bool coarse = block && s.reduced && r.chance(50);
    for (int axis = 0; axis < 3; ++axis) {
      if (coarse) s.factor[axis] = r.one_of<int64_t>({1, 2, 2, 3});
      if (g.in[axis] % s.factor[axis]) s.factor[axis] = 1;
      s.extent[axis] = g.in[axis] / s.factor[axis];
    }
    if (block) {
      s.slope = r.one_of({1.0f, 0.01f, 0.2f});
    } else {
      s.layout = r.below(4);
    }
    g.in_channels += s.channels;
    macs += s.reduced ? static_cast<double>(s.channels) * s.rows : 0;
    p.inputs.push_back(s);
  }
  return macs * g.batch * std::max(p.voxels(), g.in[0] * g.in[1] * g.in[2]) < 3e6 && p.values() < 20000;
}

void fill(Values& to, int64_t count, Random& r, bool bfloat16) {
  to.resize(count);
  for (double& value : to) {
    const uint32_t bits = bits_of(r.normal());
    value = float_of(bfloat16 ? (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u : bits);
  }
}

Problem problem(Family family, int number, bool bfloat16) {
  Random r{static_cast<uint64_t>(family) << 32 | number};
  for (;;) {
    Problem p;
    p.family = family;
    p.number = number;
    p.bfloat16 = bfloat16;
    if (!choose(p, r)) continue;
    Geometry& g = p.g;
    for (Input& s : p.inputs) {
      fill(s.x, g.batch * s.voxels() * s.width, r, bfloat16);
      if (p.nan) s.x[r.below(s.x.size())] = std::nan("");
      if (family != kConv && r.chance(60)) fill(s.scale, g.batch * s.channels, r, false);
      if (family != kConv && r.chance(60)) fill(s.shift, g.batch * s.channels, r, false);
      if (s.width != s.channels) fill(s.expand, s.width * s.channels, r, bfloat16);
      if (s.reduced) fill(s.reduce, s.positions() * s.channels * s.rows, r, bfloat16);
      if (s.layout) s.scale.clear(), s.shift.clear();
    }
    if (g.convolved) fill(p.core, p.taps() * g.rank_in * g.rank_out, r, bfloat16);
    if (g.expanded) fill(p.u_out, g.rank_out * g.out_channels, r, bfloat16);
    if (r.chance(60)) fill(p.bias, g.out_channels, r, bfloat16);
    if (family != kConv && r.chance(50)) fill(p.in_bias, g.rank_in, r, bfloat16);
    return p;
  }
}

// What the kernels should return: values [batch][channel][voxel], mean [batch][channel], and m2 with one axis of
// channels more for a covariance.
struct Result {
  Values values, mean, m2;
};

__attribute__((target_clones("avx512f", "default"))) void add_product(double* to, const double* x, int64_t in,
                                                                      const double* matrix, int64_t out) {
  for (int64_t i = 0; i < in; ++i, matrix += out)
    for (int64_t o = 0; o < out; ++o) to[o] += x[i] * matrix[o];
}

// Input `s` at a voxel of the first stage.
void add_input(const Input& s, int64_t n, int64_t d, int64_t h, int64_t w, double* to) {
  const int64_t *f = s.factor, *e = s.extent;
  const double* x = &s.x[(n * s.voxels() + (d / f[0] * e[1] + h / f[1]) * e[2] + w / f[2]) * s.width];
  Values values(x, x + s.width);
  if (!s.expand.empty()) {
    values.assign(s.channels, 0.0);
    add_product(values.data(), x, s.width, s.expand.data(), s.channels);
  }
  for (int64_t c = 0; c < s.channels; ++c) {
    double& value = values[c];
    if (!s.scale.empty()) value *= s.scale[n * s.channels + c];
    if (!s.shift.empty()) value += s.shift[n * s.channels + c];
    if (!(value > 0)) value *= s.slope;
    if (!s.reduced) to[s.offset + c] += value;
  }
  const int64_t position = (d % f[0] * f[1] + h % f[1]) * f[2] + w % f[2];
  if (s.reduced)
    add_product(to + s.offset, values.data(), s.channels, &s.reduce[position * s.channels * s.rows], s.rows);
}

Result exact(const Problem& p) {
  const Geometry& g = p.g;
  Result result;
  result.values.resize(p.values());
  const int64_t voxels = p.voxels(), channels = g.out_channels;
  Values t(g.in[0] * g.in[1] * g.in[2] * g.rank_in), z(g.rank_out), y(channels);
  for (int64_t n = 0; n < g.batch; ++n) {
    double* to = t.data();
    for (int64_t d = 0; d < g.in[0]; ++d)
      for (int64_t h = 0; h < g.in[1]; ++h)
        for (int64_t w = 0; w < g.in[2]; ++w, to += g.rank_in) {
          std::fill_n(to, g.rank_in, 0.0);
          std::copy(p.in_bias.begin(), p.in_bias.end(), to);
          for (const Input& s : p.inputs) add_input(s, n, d, h, w, to);
        }
    for (int64_t voxel = 0; voxel < voxels; ++voxel) {
      const int64_t at[] = {voxel / (g.out[1] * g.out[2]), voxel / g.out[2] % g.out[1], voxel % g.out[2]};
      std::fill(z.begin(), z.end(), 0.0);
      if (!g.convolved) std::copy_n(&t[voxel * g.rank_in], g.rank_in, z.begin());
      for (int64_t tap = 0; g.convolved && tap < p.taps(); ++tap) {
        const int64_t taps[] = {tap / (g.kernel[1] * g.kernel[2]), tap / g.kernel[2] % g.kernel[1], tap % g.kernel[2]};
        int64_t from = 0;
        bool inside = true;
        for (int axis = 0; axis < 3; ++axis) {
          const int64_t i = at[axis] * g.stride[axis] - g.padding[axis] + taps[axis] * g.dilation[axis];
          inside = inside && i >= 0 && i < g.in[axis];
          from = from * g.in[axis] + i;
        }
        const double* matrix = &p.core[tap * g.rank_in * g.rank_out];
        if (inside) add_product(z.data(), &t[from * g.rank_in], g.rank_in, matrix, g.rank_out);
      }
      std::fill(y.begin(), y.end(), 0.0);
      std::copy(p.bias.begin(), p.bias.end(), y.begin());
      if (g.expanded) add_product(y.data(), z.data(), g.rank_out, p.u_out.data(), channels);
      for (int64_t c = 0; c < channels; ++c)
        result.values[(n * channels + c) * voxels + voxel] = g.expanded ? y[c] : y[c] + z[c];
    }
  }
  if (!p.statistics) return result;
  Values deviations = result.values;
  for (int64_t c = 0; c < g.batch * channels; ++c) {
    double mean = 0;
    for (int64_t i = 0; i < voxels; ++i) mean += deviations[c * voxels + i] / voxels;
    for (int64_t i = 0; i < voxels; ++i) deviations[c * voxels + i] -= mean;
    result.mean.push_back(mean);
  }
  for (int64_t c = 0; c < g.batch * channels; ++c) {
    const int64_t first = g.covariance ? c / channels * channels : c, end = g.covariance ? first + channels : c + 1;
    for (int64_t other = first; other < end; ++other) {
      double sum = 0;
      for (int64_t i = 0; i < voxels; ++i) sum += deviations[c * voxels + i] * deviations[other * voxels + i];
      result.m2.push_back(sum);
    }
  }
  return result;
}

bool in_kernels = false;  // see __wrap_aligned_alloc

// Buffers of one call of the kernels.
class Buffers {
 public:
  ~Buffers() {
    for (void* buffer : all_) release(buffer);
  }
  template <class T>
  T* fresh(int64_t count) {
    all_.push_back(guarded(count * sizeof(T)));
    return static_cast<T*>(all_.back());
  }
  template <class T>
  T* copy(const Values& values) {
    T* const to = values.empty() ? nullptr : fresh<T>(values.size());
    for (size_t i = 0; i < values.size(); ++i) put(to[i], values[i]);
    return to;
  }
  static void put(float& to, double value) { to = static_cast<float>(value); }
  static void put(uint16_t& to, double value) { to = bits_of(static_cast<float>(value)) >> 16; }

 private:
  std::vector<void*> all_;
};

Strides strides_of(const int64_t (&e)[3], int64_t c, int64_t layout) {
  const int64_t row = layout == 3 ? 2 * e[2] : e[2], plane = e[1] * row;
  if (layout == 0) return {e[0] * plane * c, 1, {plane * c, row * c, c}};
  if (layout == 2) return {c * e[0] * plane, e[0] * plane, {plane, 1, e[1]}};
  return {c * e[0] * plane, e[0] * plane, {plane, row, 1}};
}

int64_t offset(const Strides& s, const int64_t (&e)[3], int64_t n, int64_t c, int64_t voxel) {
  return n * s.batch + c * s.channel + voxel / (e[1] * e[2]) * s.space[0] + voxel / e[2] % e[1] * s.space[1] +
         voxel % e[2] * s.space[2];
}

// T: what sources and weights are stored as; Y: the output.
template <class T, class Y>
Result run_as(const Problem& p, const char* isa) {
  OnePass pass{};
  Geometry& g = pass.g = p.g;
  Buffers memory;
  Weights weights{};
  auto view = [&](const Values& values, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
    return WeightView{memory.copy<T>(values), sizeof(T) == 4, sizes, strides};
  };
  for (const Input& s : p.inputs) {
    Source& source = pass.sources[pass.source_count++];
    source.strides = strides_of(s.extent, s.width, s.layout);
    T* const x = memory.fresh<T>(1 + offset(source.strides, s.extent, g.batch - 1, s.width - 1, s.voxels() - 1));
    for (size_t i = 0; i < s.x.size(); ++i) {
      const int64_t voxel = i / s.width;
      Buffers::put(x[offset(source.strides, s.extent, voxel / s.voxels(), i % s.width, voxel % s.voxels())], s.x[i]);
    }
    source.x = x;
    source.channels = s.channels;
    source.width = s.width;
    std::copy_n(s.factor, 3, source.factor);
    source.scale = memory.copy<float>(s.scale);
    source.shift = memory.copy<float>(s.shift);
    source.slope = s.slope;
    source.rows = s.rows;
    source.offset = s.offset;
    source.adds = &s != &p.inputs[0] && s.rows == g.rank_in;
    weights.expand.emplace_back();
    if (!s.expand.empty()) {
      weights.expand.back() = view(s.expand, {s.channels, s.width}, {1, s.channels});
      g.source_ranks = std::max(g.source_ranks, s.width);
      g.source_macs += s.width * s.channels;
    }
    const int64_t r = s.rows, c = s.channels;
    weights.reduce.emplace_back();
    if (!s.reduced) continue;
    g.reduce_macs += r * c;
    if (s.positions() > 1) {
      g.coarse_channels += ceil_div(c, kMostLanes) * kMostLanes;
      weights.reduce.back() = view(s.reduce, {s.positions(), r, c}, {c * r, 1, r});
    } else {
      weights.reduce.back() = view(s.reduce, {r, c}, {1, r});
    }
  }
  const int64_t ranks = g.rank_in * g.rank_out, *k = g.kernel;
  if (g.convolved)
    weights.core = view(p.core, {g.rank_out, g.rank_in, k[0], k[1], k[2]},
                        {1, g.rank_out, k[1] * k[2] * ranks, k[2] * ranks, ranks});
  if (g.expanded) weights.u_out = view(p.u_out, {g.out_channels, g.rank_out}, {1, g.out_channels});
  if (!p.bias.empty()) weights.bias = view(p.bias, {g.out_channels}, {1});
  if (!p.in_bias.empty()) weights.in_bias = view(p.in_bias, {g.rank_in}, {1});
  Y* const y = memory.fresh<Y>(p.values());
  pass.y = y;
  pass.y_is_float = sizeof(Y) == 4;
  pass.y_strides = strides_of(p.g.out, g.out_channels, p.contiguous);
  std::optional<Statistics> statistics;
  const int64_t means = g.batch * g.out_channels, products = means * (g.covariance ? g.out_channels : 1);
  if (p.statistics) statistics = {memory.fresh<float>(means), memory.fresh<float>(products)};
  setenv("TUCKER_CPU_ISA", isa, 1);
  setenv("TUCKER_CPU_CORE", p.way, 1);
  torch::stable::threads = p.threads;
  in_kernels = true;
  execute("emulated", pass, weights, p.bfloat16, statistics);
  in_kernels = false;
  Result result;
  for (int64_t c = 0; c < means; ++c)
    for (int64_t voxel = 0; voxel < p.voxels(); ++voxel) {
      const Y value = y[offset(pass.y_strides, g.out, c / g.out_channels, c % g.out_channels, voxel)];
      result.values.push_back(sizeof(Y) == 4 ? value : float_of(static_cast<uint32_t>(value) << 16));
    }
  if (!statistics) return result;
  result.mean.assign(statistics->mean, statistics->mean + means);
  result.m2.assign(statistics->m2, statistics->m2 + products);
  return result;
}

Result run(const Problem& p, const char* isa) {
  if (!p.bfloat16) return run_as<float, float>(p, isa);
  return p.float_values ? run_as<uint16_t, float>(p, isa) : run_as<uint16_t, uint16_t>(p, isa);
}

// Shares of what tests/ops allows: values by root mean squares, statistics as a norm needs them.
struct Error {
  double values = 0, statistics = 0;

  static void raise(double& to, double off, double limit) {
    const double share = off == 0 ? 0 : off / limit;
    if (!(share <= to)) to = share == share ? share : INFINITY;
  }
};

Error judge(const Problem& p, const Result& result, const Result& expected) {
  Error error;
  const Geometry& g = p.g;
  const double tolerance = p.bfloat16 ? 5e-3 : 2e-5;
  double squares = 0, size = 0;
  for (size_t i = 0; i < expected.values.size(); ++i) {
    const double wanted = expected.values[i], off = result.values[i] - wanted;
    if (wanted == wanted) {
      squares += off * off;
      size += wanted * wanted;
    } else if (result.values[i] == result.values[i]) {
      squares = INFINITY;
    }
  }
  const double unit = size > 0 ? std::sqrt(size) : 1;
  // Roundings of few values do not average out, be they those of an intermediate.
  const int64_t in_voxels = g.in[0] * g.in[1] * g.in[2];
  const int64_t least = std::min({p.values(), g.batch * p.voxels() * g.rank_out, g.batch * in_voxels * g.rank_in});
  error.raise(error.values, std::sqrt(squares), tolerance * (least < 256 ? 4 : 1) * unit);
  if (!p.statistics || p.nan) return error;
  const double count = p.voxels(), share = p.bfloat16 ? 1 : std::max(1e-3, 1 / std::sqrt(count));
  const int64_t means = g.batch * g.out_channels, step = g.covariance ? g.out_channels : 1;
  auto variance_of = [&](int64_t c) { return c * step + c % step; };
  double both = 0;
  for (int64_t c = 0; c < means; ++c)
    both += (expected.mean[c] * expected.mean[c] + expected.m2[variance_of(c)] / count) / means;
  Values sigma(means), most(means);
  for (int64_t c = 0; c < means; ++c) {
    const double m2 = expected.m2[variance_of(c)];
    sigma[c] = std::sqrt(m2 / count) + share * std::sqrt(both);
    most[c] = std::sqrt(m2 + count * sigma[c] * sigma[c]);
  }
  for (int64_t c = 0; c < means; ++c) {
    error.raise(error.statistics, std::abs(result.mean[c] - expected.mean[c]), 4 * tolerance * sigma[c]);
    const int64_t first = c / step * step;
    for (int64_t d = 0; d < step; ++d) {
      const double off = std::abs(result.m2[c * step + d] - expected.m2[c * step + d]);
      error.raise(error.statistics, off, 4 * tolerance * most[c] * most[first + d]);
      if (result.m2[c * step + d] != result.m2[(first + d) * step + c % step]) error.statistics = INFINITY;
    }
  }
  return error;
}

struct Summary {
  int cases = 0, failed = 0, matrix = 0;
  double values = 0, statistics = 0;
  uint64_t hash = 14695981039346656037u;
};

}  // namespace

extern "C" {
void* __real_aligned_alloc(size_t alignment, size_t bytes);
void __real_free(void* data);
long __real_sysconf(int name);

// Scratch memory, packed weights and statistics. What the kernels ask for is a multiple of its alignment.
void* __wrap_aligned_alloc(size_t alignment, size_t bytes) {
  return in_kernels ? guarded(bytes) : __real_aligned_alloc(alignment, bytes);
}
void __wrap_free(void* data) {
  if (data && !release(data)) __real_free(data);
}
// The size of the cache decides on tiles, and so on the last bits.
long __wrap_sysconf(int name) { return name == _SC_LEVEL2_CACHE_SIZE ? 512 * 1024 : __real_sysconf(name); }
}

int main(int count, char** arguments) {
  std::printf("this processor has %s\n", tucker_ops_cpu_isas());
  const int every = count > 2 ? std::atoi(arguments[1]) : 0;
  if (every < 1) return std::puts("usage: emulated EVERY ISA..."), 2;
  std::map<std::string, Summary> summaries;
  int failed = 0;
  for (int family = 0; family < kFamilies; ++family)
    for (int number = 0; number < kCases[family]; number += every)
      for (bool bfloat16 : {false, true}) {
        const Problem p = problem(static_cast<Family>(family), number, bfloat16);
        const Result expected = exact(p);
        for (int i = 2; i < count; ++i) {
          const char* const isa = arguments[i];
          // In float32 these are avx512 by another name.
          if (!bfloat16 && std::strstr(isa, "_bf16")) continue;
          tucker_matrix_stores = 0;
          const Result result = run(p, isa);
          const Error error = judge(p, result, expected);
          Summary& s = summaries[std::string(isa) + (bfloat16 ? " bf16 " : " fp32 ") + kNames[family]];
          ++s.cases;
          s.matrix += tucker_matrix_stores > 0;
          s.values = std::max(s.values, error.values);
          s.statistics = std::max(s.statistics, error.statistics);
          for (const auto* part : {&result.values, &result.mean, &result.m2})
            for (double value : *part) s.hash = (s.hash ^ (value == value ? bits_of(value) : 0)) * 1099511628211u;
          if (error.values <= 1 && error.statistics <= 1) continue;
          ++s.failed;
          ++failed;
          std::printf("FAILED %s: values %.3g, statistics %.3g: %s\n", isa, error.values, error.statistics,
                      p.text().c_str());
          std::fflush(stdout);
        }
      }
  for (const auto& [name, s] : summaries)
    std::printf("%-24s cases %3d  failed %d  matrix unit %3d  errors, of what is allowed: values %.3f statistics %.3f  "
                "bits %016lx\n",
                name.c_str(), s.cases, s.failed, s.matrix, s.values, s.statistics, s.hash);
  return failed > 0;
}
