// Small kernels, each with one fault, to show that the emulated multiprocessor finds it.
#include <cstdio>
#include <vector>

#include "../../csrc/cuda/launch.cuh"

using namespace tucker_ops::cuda;

namespace {

struct Fault {
  int which;
  float* memory;  // 64 values
};

struct Faulty {
  using Params = Fault;
  static constexpr int kThreads = 64, kBlocks = 1;

  static TUCKER_DEVICE void run(const Params& p) {
    const int i = thread_index();
    const uint32_t at = shared_base() + 4 * i, other = shared_base() + 4 * (63 - i);
    switch (p.which) {
      case 0:  // right
        shared_store4(at, i);
        barrier();
        store(p.memory + i, static_cast<float>(shared_load4(other)));
        return;
      case 1:  // read by another warp without a barrier
        shared_store4(at, i);
        store(p.memory + i, static_cast<float>(shared_load4(other)));
        return;
      case 2:  // written again while another warp may still read
        shared_store4(at, i);
        barrier();
        store(p.memory + i, static_cast<float>(shared_load4(other)));
        shared_store4(at, i + 1);
        return;
      case 3:
        store(p.memory + i, static_cast<float>(shared_load4(at)));
        return;
      case 4:
        shared_store4(at + 256, i);
        return;
      case 5:
        store(p.memory + i + 1, 0.0f);
        return;
      case 6:
        load16(p.memory + 1);
        return;
      case 7:  // half of a warp at the barrier
        if (i % 32 < 16) barrier();
        return;
      case 8:  // half of a warp at a shuffle, half at the barrier
        if (i % 32 < 16)
          shuffle_xor(1.0f, 1);
        else
          barrier();
        return;
      case 9:  // one warp leaves early
        if (i < 32) return;
        barrier();
        return;
    }
  }
};

}  // namespace

// What was said of fault `which`, empty if nothing was found.
extern "C" __attribute__((visibility("default"))) void tucker_emulated_fault(int which, char* text, int64_t size) {
  std::vector<float> memory(64);
  emulation::lend(memory.data(), 64 * 4, true);
  std::snprintf(text, size, "%s", start<Faulty>({which, memory.data()}, {1}, 256, nullptr).c_str());
  emulation::forget();
  if (which == 0)
    for (int i = 0; i < 64; ++i)
      if (memory[i] != 63 - i) std::snprintf(text, size, "wrong value");
}
