// The Python module sparseopt._C: loading it registers the CPU kernels; the object itself tells how it was built.
// Schemas are defined in sparseopt/_schema.py. Only pybind11's own headers: torch/extension.h costs 20 s a file.
#include <pybind11/pybind11.h>

#include <ATen/Parallel.h>
#include <torch/version.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
#if defined(_OPENMP)
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
#if defined(__x86_64__)
  // The clone that the loader picks on this processor.
  info["instructions"] = __builtin_cpu_supports("avx512bw") ? "avx512" : __builtin_cpu_supports("avx2") ? "avx2" : "baseline";
#else
  info["instructions"] = "baseline";
#endif
  info["threads"] = at::get_num_threads();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of sparseopt.";
  m.def("build_info", &build_info, "How and for what the kernels were built.");
}
