#include "pool.h"

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <list>
#include <mutex>

#include "execute.h"
#include "one_pass.h"

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace tucker_ops::cpu {
namespace {

constexpr int64_t kHugePage = 2 * 1024 * 1024;
constexpr int64_t kSmallestPooled = 2 * kHugePage;
constexpr int64_t kDefaultMegabytes = 1024;
// A buffer serves a tensor of at least this share of it.
constexpr double kLeastUse = 0.5;

// Of the idle buffers those given back last stay as they are, up to this share of the limit: to hand pages to the system
// stops every thread, and to write to them again costs as much as clearing them.
constexpr int64_t kWarmShare = 4;

struct Buffer {
  void* data;
  int64_t bytes;
  bool warm = true;
};

// Whole huge pages of their own, not a piece of the heap: there the system would hand out small pages, and to mark those
// as free and take them again costs a sixth of the time of what is computed into them. Null where there is no memory.
void* allocate(int64_t bytes) {
#if defined(__linux__)
  void* const room = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) return nullptr;
  char* const from = static_cast<char*>(room);
  const int64_t before = (kHugePage - reinterpret_cast<uintptr_t>(from) % kHugePage) % kHugePage;
  if (before > 0) munmap(from, before);
  munmap(from + before + bytes, kHugePage - before);
  madvise(from + before, bytes, MADV_HUGEPAGE);
  return from + before;
#else
  return std::aligned_alloc(kHugePage, bytes);
#endif
}

void release(Buffer buffer) {
#if defined(__linux__)
  munmap(buffer.data, buffer.bytes);
#else
  std::free(buffer.data);
#endif
}

int64_t most_idle_bytes() {
  const char* megabytes = std::getenv("TUCKER_CPU_POOL_MB");
  if (!megabytes || !*megabytes) return kDefaultMegabytes << 20;
  return std::max<int64_t>(0, std::min<int64_t>(std::atoll(megabytes), INT64_MAX >> 20)) << 20;
}

// Oldest first. Never waits for its lock, so a child forked while another thread held it only loses the idle buffers.
class Pool {
 public:
  Buffer take(int64_t bytes) {
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      auto best = idle_.end();
      for (auto it = idle_.begin(); it != idle_.end(); ++it)
        if (it->bytes >= bytes && bytes >= kLeastUse * it->bytes && (best == idle_.end() || it->bytes <= best->bytes)) best = it;
      if (best != idle_.end()) {
        const Buffer found = *best;
        idle_.erase(best);
        bytes_ -= found.bytes;
        if (found.warm) warm_bytes_ -= found.bytes;
        return {found.data, found.bytes};
      }
    }
    return {allocate(bytes), bytes};
  }

  void give_back(Buffer buffer) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    const int64_t most = most_idle_bytes();
    if (!lock || buffer.bytes > most) return release(buffer);
    bytes_ += buffer.bytes;
    warm_bytes_ += buffer.bytes;
    idle_.push_back(buffer);
    while (bytes_ > most) {
      bytes_ -= idle_.front().bytes;
      if (idle_.front().warm) warm_bytes_ -= idle_.front().bytes;
      release(idle_.front());
      idle_.pop_front();
    }
    for (auto it = idle_.begin(); warm_bytes_ > most / kWarmShare; ++it) {
      if (!it->warm) continue;
#if defined(__linux__)
      madvise(it->data, it->bytes, MADV_FREE);
#endif
      it->warm = false;
      warm_bytes_ -= it->bytes;
    }
  }

  int64_t bytes() {
    const std::unique_lock lock(mutex_);
    return bytes_;
  }

 private:
  std::mutex mutex_;
  std::list<Buffer> idle_;
  int64_t bytes_ = 0, warm_bytes_ = 0;
};

Pool& pool() {
  // Never destroyed: tensors may outlive everything else in the process.
  static Pool& instance = *new Pool;
  return instance;
}

}  // namespace

Tensor pooled_empty(const std::vector<int64_t>& size, ScalarType dtype, bool channels_last) {
  int64_t elements = 1;
  for (int64_t extent : size) elements *= extent;
  const int64_t bytes = elements * (dtype == ScalarType::Float ? 4 : 2);
  const Buffer buffer = bytes < kSmallestPooled || most_idle_bytes() == 0
                            ? Buffer{nullptr, 0}
                            : pool().take(ceil_div(bytes, kHugePage) * kHugePage);
  if (!buffer.data) {
    const MemoryFormat last = size.size() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
    Tensor plain = torch::stable::empty(size, dtype, std::nullopt, std::nullopt, std::nullopt,
                                        channels_last ? last : MemoryFormat::Contiguous);
    if (bytes > 0) advise_huge_pages(plain.mutable_data_ptr(), bytes);
    return plain;
  }
  std::vector<int64_t> strides(size.size());
  int64_t stride = 1;
  auto next = [&](size_t axis) {
    strides[axis] = stride;
    stride *= size[axis];
  };
  if (channels_last) next(1);
  for (size_t axis = size.size() - 1; axis >= 2; --axis) next(axis);
  if (!channels_last) next(1);
  next(0);
  return torch::stable::from_blob(buffer.data, size, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  dtype, [buffer](void*) { pool().give_back(buffer); });
}

}  // namespace tucker_ops::cpu

int64_t tucker_ops_cpu_pool_bytes() { return tucker_ops::cpu::pool().bytes(); }
