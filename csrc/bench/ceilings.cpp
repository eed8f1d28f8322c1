#include "ceilings.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>

#include "../common/amx.h"

namespace tucker_ops::bench {
namespace {

using Clock = std::chrono::steady_clock;

// Some microseconds between two looks at the clock.
constexpr std::int64_t kTurns = 1 << 12;

// Calls step() until `seconds` have passed, at least once; returns calls a second.
template <typename Step>
double rate(double seconds, Step step) {
  const auto begin = Clock::now();
  std::int64_t calls = 0;
  double elapsed;
  do {
    step();
    ++calls;
    elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
  } while (elapsed < seconds);
  return calls / elapsed;
}

// The sum of what work(0), …, work(threads - 1) return, each on a thread of its own.
template <typename Work>
double in_parallel(int threads, Work work) {
  std::vector<double> results(threads);
  {
    std::vector<std::jthread> team;
    for (int index = 0; index < threads; ++index)
      team.emplace_back([&results, &work, index] { results[index] = work(index); });
  }
  return std::accumulate(results.begin(), results.end(), 0.0);
}

}  // namespace

std::vector<const FmaLoop*> fma_loops() {
  std::vector<const FmaLoop*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
#if defined(TUCKER_AMX_BF16)
    if (has_amx_bf16()) found.push_back(&fma_amx_bf16);
#endif
#if defined(TUCKER_AVX512_BF16)
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(&fma_avx512_bf16);
#endif
    found.push_back(&fma_avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&fma_avx2);
#endif
  found.push_back(&fma_baseline);
  return found;
}

double peak(const FmaLoop& loop, int threads, double seconds) {
  // Written, so that no compiler may leave the arithmetic out.
  std::atomic<float> result;
  const double calls = in_parallel(threads, [&](int) {
    return rate(seconds, [&] { result.store(loop.run(kTurns), std::memory_order_relaxed); });
  });
  return calls * kTurns * loop.flops_per_turn / 1e9;
}

double copy(int threads, std::size_t bytes, double seconds) {
  const std::size_t slice = bytes / threads;
  const auto source = std::make_unique_for_overwrite<char[]>(slice * threads);
  const auto target = std::make_unique_for_overwrite<char[]>(slice * threads);
  // Touched first by the thread that copies it, which places it near that thread's memory controller.
  in_parallel(threads, [&](int index) {
    std::memset(source.get() + index * slice, 1, slice);
    std::memset(target.get() + index * slice, 2, slice);
    return 0.0;
  });
  const double copies = in_parallel(threads, [&](int index) {
    return rate(seconds, [&] { std::memcpy(target.get() + index * slice, source.get() + index * slice, slice); });
  });
  return 2 * copies * slice / 1e9;
}

}  // namespace tucker_ops::bench
