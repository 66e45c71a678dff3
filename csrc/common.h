// Shared by all ops: the chunk table, 16-bit conversions, per-function instruction sets.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <bit>
#include <cstdint>
#include <cstring>

// Wide instructions without -march=native: the loader picks the clone that the processor can run.
// Micro-architecture levels, not names: "arch=skylake-avx512" would match that Intel processor only, never an AMD one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SPARSEOPT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SPARSEOPT_CLONES
#endif

#define SPARSEOPT_INLINE inline __attribute__((always_inline))

namespace sparseopt {

// One row of the chunk table, int64[C, 6]; see sparseopt/_schema.py.
struct Chunk {
  int64_t tensor;       // position in the lists of tensors
  int64_t base;         // flat element that the offsets count from
  int64_t start;        // first arena entry
  int64_t count;        // arena entries
  int64_t index_start;  // first stored offset
  int64_t shift;        // one stored offset per 2^shift entries
};
static_assert(sizeof(Chunk) == 6 * sizeof(int64_t));

inline const Chunk* chunk_rows(const at::Tensor& chunks) {
  TORCH_CHECK(chunks.scalar_type() == at::kLong && chunks.dim() == 2 && chunks.size(1) == 6 && chunks.is_contiguous(),
              "chunks must be a contiguous int64[C, 6]");
  return reinterpret_cast<const Chunk*>(chunks.const_data_ptr<int64_t>());
}

inline void check_chunks(const Chunk* rows, int64_t count, int64_t first_tensor, int64_t tensors, int64_t active,
                         int64_t offsets) {
  // O(C): cheap beside the work, and a wrong table would write anywhere.
  for (int64_t c = 0; c < count; ++c) {
    const Chunk& k = rows[c];
    TORCH_CHECK(k.tensor >= first_tensor && k.tensor < first_tensor + tensors && k.start >= 0 && k.count >= 0 &&
                    k.start + k.count <= active && k.index_start >= 0 &&
                    (k.shift == 0 || (k.shift >= 3 && k.shift <= 6 && k.count % (int64_t{1} << k.shift) == 0) ||
                     (k.shift > 6 && k.shift < 32 && k.count <= (int64_t{1} << k.shift))) &&
                    k.index_start + ((k.count + (int64_t{1} << k.shift) - 1) >> k.shift) <= offsets,
                "chunk ", c, " does not fit the tensors");
  }
}

// Asks the kernel for 2 MiB pages for a large fresh output: its page faults cost more than the work that fills it.
inline void advise_huge_pages(const at::Tensor& output) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const auto begin = (reinterpret_cast<uintptr_t>(output.mutable_data_ptr()) + kHuge - 1) & ~(kHuge - 1);
  const auto end = (reinterpret_cast<uintptr_t>(output.mutable_data_ptr()) + output.nbytes()) & ~(kHuge - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: failure is harmless
#endif
}

SPARSEOPT_INLINE float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// Round to nearest even; NaN stays NaN.
SPARSEOPT_INLINE uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? ((bits >> 16) | 0x40u) : rounded);
}

}  // namespace sparseopt
