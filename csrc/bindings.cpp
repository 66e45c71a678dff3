// The Python module sparseopt._C: loading it registers the CPU kernels; the object itself tells how it was built,
// and carries the mask codec.
// Schemas are defined in sparseopt/_schema.py. Only pybind11's own headers: torch/extension.h costs 20 s a file.
#include <pybind11/pybind11.h>

#include <ATen/Parallel.h>
#include <torch/version.h>

#include <string>

#include "codec.h"

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

// ---- mask codec ------------------------------------------------------------------------------------------------------
struct Bytes {
  py::buffer_info info;
  uint8_t* data;
  size_t size;
};

Bytes bytes_of(const py::buffer& buffer, const char* name, bool writable) {
  py::buffer_info info = buffer.request(writable);
  if (info.itemsize != 1 || info.ndim != 1 || (info.size > 1 && info.strides[0] != 1)) {
    throw py::type_error(std::string(name) + " must be a contiguous vector of bytes");
  }
  auto* data = static_cast<uint8_t*>(info.ptr);
  const auto size = static_cast<size_t>(info.size);
  return {std::move(info), data, size};
}

void check_size(const Bytes& bits, int64_t n) {
  if (n < 0 || n >= int64_t{1} << sparseopt::kMaxBits || bits.size != static_cast<size_t>((n + 7) / 8)) {
    throw py::value_error("a packed mask of " + std::to_string(n) + " entries cannot have " + std::to_string(bits.size) +
                          " bytes");
  }
  if (n % 8 && bits.data[bits.size - 1] >> (n % 8)) throw py::value_error("bits are set past the mask's entries");
}

py::bytes encode_mask(const py::buffer& packed, int64_t n, int64_t limit) {
  const Bytes bits = bytes_of(packed, "packed", false);
  check_size(bits, n);
  if (limit < 0) throw py::value_error("limit must not be negative");
  std::string stream;
  {
    const py::gil_scoped_release release;
    stream = sparseopt::encode_mask(bits.data, static_cast<uint64_t>(n), static_cast<size_t>(limit));
  }
  return stream;
}

void decode_mask(const py::buffer& stream, const py::buffer& packed, int64_t n) {
  const Bytes coded = bytes_of(stream, "stream", false), bits = bytes_of(packed, "packed", true);
  check_size(bits, n);
  const char* problem;
  {
    const py::gil_scoped_release release;
    problem = sparseopt::decode_mask(coded.data, coded.size, bits.data, static_cast<uint64_t>(n));
  }
  if (problem) throw py::value_error(problem);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of sparseopt.";
  m.def("build_info", &build_info, "How and for what the kernels were built.");
  m.def("encode_mask", &encode_mask, py::arg("packed"), py::arg("n"), py::arg("limit"),
        "Codes a packed mask of n entries; empty if that takes `limit` bytes or more.");
  m.def("decode_mask_", &decode_mask, py::arg("stream"), py::arg("packed"), py::arg("n"),
        "Flips the coded entries of a packed mask of n entries; ValueError for a damaged stream, its target then undefined.");
}
