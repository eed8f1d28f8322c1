// Coroutines for the threads of a block, and the checks that emulation.h promises. x86-64, System V calling convention.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "emulation.h"

extern "C" void tucker_switch(void** save, void* to);
// Saves what a callee must keep, and goes on where `to` stopped.
asm(R"(
.globl tucker_switch
.hidden tucker_switch
.type tucker_switch, @function
tucker_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace tucker_ops::cuda::emulation {
namespace {

constexpr int kLanes = 32;
constexpr size_t kStack = 64 * 1024;

struct Span {
  const unsigned char *begin, *end;
  bool writable;
};
std::vector<Span> lent;

// Of two bytes of shared memory: who touched them since which barrier.
struct Shadow {
  int64_t written_in = -1, read_in = -1;
  int writer = 0;
  uint32_t readers = 0;
  bool initialised = false;
};

struct Warp {
  void* lane_sp[kLanes];
  int finished = 0;
  bool waiting = false;
  // What lanes gave at this meeting and the one before.
  alignas(16) unsigned char given[2][kLanes * kMostBytes];
  Meeting kinds[2][kLanes];
  int64_t meetings[kLanes];
};

struct State {
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<unsigned char> stacks;
  std::vector<unsigned char> shared;
  std::vector<Shadow> shadows;
  const std::function<void()>* kernel = nullptr;
  Block block{};
  void* scheduler_sp = nullptr;
  int warp = 0, lane = 0;
  int64_t epoch = 0;
  std::string error;
};
State state;

[[noreturn]] void fail(const std::string& what) {
  if (state.error.empty()) {
    state.error = "block (" + std::to_string(state.block.x) + ", " + std::to_string(state.block.y) + ", " +
                  std::to_string(state.block.z) + "), thread " + std::to_string(thread()) + ": " + what;
  }
  // Never resumed: the stack is given up as it is.
  void* ignored;
  tucker_switch(&ignored, state.scheduler_sp);
  std::abort();
}

void go_to(int lane) {
  Warp& warp = *state.warps[state.warp];
  void** save = &warp.lane_sp[state.lane];
  state.lane = lane;
  tucker_switch(save, warp.lane_sp[lane]);
}

void stop_for_scheduler() {
  Warp& warp = *state.warps[state.warp];
  tucker_switch(&warp.lane_sp[state.lane], state.scheduler_sp);
}

void thread_main() {
  (*state.kernel)();
  Warp& warp = *state.warps[state.warp];
  const int lane = state.lane;
  ++warp.finished;
  // Lanes finish in order, the last one ends the warp.
  if (lane + 1 < kLanes) {
    state.lane = lane + 1;
    void* ignored;
    tucker_switch(&ignored, warp.lane_sp[lane + 1]);
  }
  if (warp.finished != kLanes) fail("this lane ended, others of its warp wait at a collective function");
  void* ignored;
  tucker_switch(&ignored, state.scheduler_sp);
  std::abort();
}

void prepare(Warp& warp, unsigned char* stacks) {
  for (int lane = 0; lane < kLanes; ++lane) {
    auto top = reinterpret_cast<uintptr_t>(stacks + (lane + 1) * kStack) & ~uintptr_t{15};
    auto* sp = reinterpret_cast<void**>(top);
    *--sp = nullptr;  // keeps the alignment that a call leaves
    *--sp = reinterpret_cast<void*>(&thread_main);
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    warp.lane_sp[lane] = sp;
    warp.meetings[lane] = 0;
  }
  warp.finished = 0;
  warp.waiting = false;
}

void run_block(std::mt19937& random) {
  ++state.epoch;
  for (Shadow& shadow : state.shadows) shadow.initialised = false;
  std::fill(state.shared.begin(), state.shared.end(), 0xff);
  const int count = state.warps.size();
  for (int w = 0; w < count; ++w) prepare(*state.warps[w], state.stacks.data() + w * kLanes * kStack);
  std::vector<int> order(count);
  while (state.error.empty()) {
    order.clear();
    for (int w = 0; w < count; ++w)
      if (state.warps[w]->finished == 0) order.push_back(w);
    if (order.empty()) return;
    if (order.size() != state.warps.size()) {
      state.error = "some warps ended while others wait at a barrier";
      return;
    }
    std::shuffle(order.begin(), order.end(), random);
    for (int w : order) {
      state.warp = w;
      state.lane = 0;
      tucker_switch(&state.scheduler_sp, state.warps[w]->lane_sp[0]);
      if (!state.error.empty()) return;
    }
    ++state.epoch;
  }
}

}  // namespace

int thread() { return state.warp * kLanes + state.lane; }
Block block() { return state.block; }

void lend(const void* begin, int64_t bytes, bool writable) {
  const auto* first = static_cast<const unsigned char*>(begin);
  if (bytes > 0) lent.push_back({first, first + bytes, writable});
}
void forget() { lent.clear(); }

void check_global(const void* p, int64_t bytes, int64_t alignment, bool writing) {
  const auto* first = static_cast<const unsigned char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % alignment) fail("global memory: an access of " + std::to_string(bytes) + " bytes is not aligned");
  for (const Span& span : lent)
    if (first >= span.begin && first + bytes <= span.end && (span.writable || !writing)) return;
  fail(std::string("global memory: ") + (writing ? "writes" : "reads") + " outside every tensor");
}

unsigned char* shared(uint32_t at, int bytes, bool writing) {
  if (at % bytes) fail("shared memory: an access of " + std::to_string(bytes) + " bytes at " + std::to_string(at) + " is not aligned");
  if (at + bytes > state.shared.size()) fail("shared memory: byte " + std::to_string(at) + " of " + std::to_string(state.shared.size()));
  for (uint32_t i = at / 2; i < (at + bytes) / 2; ++i) {
    Shadow& s = state.shadows[i];
    const bool written = s.written_in == state.epoch, read = s.read_in == state.epoch;
    if (written && s.writer != state.warp) fail("shared memory: a race with a writing warp at byte " + std::to_string(at));
    if (writing) {
      if (read && (s.readers & ~(1u << state.warp))) fail("shared memory: a race with a reading warp at byte " + std::to_string(at));
      s.written_in = state.epoch;
      s.writer = state.warp;
      s.initialised = true;
    } else {
      if (!s.initialised) fail("shared memory: byte " + std::to_string(2 * i) + " is read before it was written");
      s.readers = (read ? s.readers : 0) | 1u << state.warp;
      s.read_in = state.epoch;
    }
  }
  return state.shared.data() + at;
}

const unsigned char* meet(Meeting kind, const void* given, int bytes) {
  Warp& warp = *state.warps[state.warp];
  const int lane = state.lane;
  if (warp.finished) fail("this lane waits at a collective function, others of its warp have ended");
  const int parity = warp.meetings[lane]++ % 2;
  if (bytes) std::memcpy(warp.given[parity] + lane * kMostBytes, given, bytes);
  warp.kinds[parity][lane] = kind;
  if (lane + 1 < kLanes) {
    go_to(lane + 1);
  } else if (kind == Meeting::kBarrier) {
    state.lane = lane;
    stop_for_scheduler();
    // The scheduler goes on with lane 0, which hands over in turn.
  } else {
    go_to(0);
  }
  for (int other = 0; other < kLanes; ++other)
    if (warp.kinds[parity][other] != kind) fail("lanes of a warp met at different functions");
  return warp.given[parity];
}

std::string run(const Block& grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  static std::mt19937 random(1);
  state.error.clear();
  state.kernel = &kernel;
  while (static_cast<int>(state.warps.size()) < threads / kLanes) state.warps.push_back(std::make_unique<Warp>());
  state.warps.resize(threads / kLanes);
  state.stacks.resize(threads * kStack);
  state.shared.assign(shared_bytes, 0);
  state.shadows.assign(shared_bytes / 2 + 1, Shadow{});
  for (int z = 0; z < grid.z; ++z)
    for (int y = 0; y < grid.y; ++y)
      for (int x = 0; x < grid.x; ++x) {
        state.block = {x, y, z};
        run_block(random);
        if (!state.error.empty()) return state.error;
      }
  return {};
}

}  // namespace tucker_ops::cuda::emulation
