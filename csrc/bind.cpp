// Host module: what the build knows about itself. No torch header: torch ships another pybind11.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information of tucker_ops.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = TUCKER_COMPILER;
        info["build_type"] = TUCKER_BUILD_TYPE;
        info["cxx_standard"] = static_cast<long>(__cplusplus);
#if defined(__x86_64__)
        info["cpu_kernels"] = pybind11::make_tuple("avx512", "avx2", "baseline", "wide");
#else
        info["cpu_kernels"] = pybind11::make_tuple("baseline");
#endif
        return info;
      },
      "Compiler, build type, C++ standard and the instruction sets compiled in.");
}
