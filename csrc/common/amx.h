// Whether this process may use the tile registers of AMX.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tucker_ops {

// Linux hands the 8 KB of state out on request; asking twice is harmless.
inline bool has_amx_bf16() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kOsSavesState = 1u << 27, kBf16 = 1u << 22, kTile = 1u << 24, kTileState = 3u << 17;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsSavesState)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile)) return false;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (a & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace tucker_ops
