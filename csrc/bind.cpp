// Host module: what the build knows about itself, and what the machine can do. No torch header: torch ships another
// pybind11.
#include <pybind11/pybind11.h>

#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>

#include "bench/ceilings.h"

namespace {

namespace bench = tucker_ops::bench;

constexpr int kMostThreads = 4096;

void check(int threads, double seconds) {
  if (threads < 1 || threads > kMostThreads)
    throw std::invalid_argument("threads must be 1 to " + std::to_string(kMostThreads) + ", got " +
                                std::to_string(threads));
  if (!std::isfinite(seconds) || seconds <= 0)
    throw std::invalid_argument("seconds must be positive, got " + std::to_string(seconds));
}

double peak(const std::string& isa, const std::string& dtype, int threads, double seconds) {
  check(threads, seconds);
  std::string known;
  for (const bench::FmaLoop* loop : bench::fma_loops()) {
    if (loop->isa == isa && loop->dtype == dtype) {
      pybind11::gil_scoped_release released;
      return bench::peak(*loop, threads, seconds);
    }
    known += (known.empty() ? "" : ", ") + (std::string(loop->isa) + " " + loop->dtype);
  }
  std::ostringstream message;
  message << "this processor and build have no loop for " << isa << " " << dtype << "; they have " << known;
  throw std::invalid_argument(message.str());
}

double copy(int threads, std::size_t bytes, double seconds) {
  check(threads, seconds);
  if (bytes < static_cast<std::size_t>(threads))
    throw std::invalid_argument("bytes must be at least one a thread, got " + std::to_string(bytes));
  pybind11::gil_scoped_release released;
  return bench::copy(threads, bytes, seconds);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  namespace py = pybind11;
  m.doc() = "Build information of tucker_ops, and what this machine can do at most.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = TUCKER_COMPILER;
        info["build_type"] = TUCKER_BUILD_TYPE;
        info["cxx_standard"] = static_cast<long>(__cplusplus);
#if defined(__x86_64__)
        py::list kernels;
#if defined(TUCKER_AMX_BF16)
        kernels.append("amx_bf16");
#endif
#if defined(TUCKER_AVX512_BF16)
        kernels.append("avx512_bf16");
#endif
        for (const char* name : {"avx512", "avx2", "baseline", "wide", "wide_bf16", "wide_amx"}) kernels.append(name);
        info["cpu_kernels"] = py::tuple(kernels);
#else
        info["cpu_kernels"] = py::make_tuple("baseline");
#endif
        return info;
      },
      "Compiler, build type, C++ standard and the instruction sets compiled in.");
  m.def(
      "peaks",
      [] {
        py::list found;
        for (const bench::FmaLoop* loop : bench::fma_loops()) found.append(py::make_tuple(loop->isa, loop->dtype));
        return found;
      },
      "(instruction set, dtype) of every loop that `peak` can run here, best first.");
  m.def("peak", &peak, py::arg("isa"), py::arg("dtype"), py::arg("threads"), py::arg("seconds"),
        "GFLOP/s of multiply-adds in registers, all threads together; ValueError for a loop that is not to be had.");
  m.def("copy", &copy, py::arg("threads"), py::arg("bytes"), py::arg("seconds"),
        "GB/s, read and written together, of copying a buffer of `bytes` bytes in slices, one a thread.");
}
