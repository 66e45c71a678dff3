// Bit-packed masks: pack, unpack, popcount, overlap, packed -> sorted indices.
//
//   packed: uint8[ceil(n/8)], little bit order (entry i is bit i % 8 of byte i / 8), unused bits zero.
//
// All are bound by memory: 1 byte read per bool when packing, 1/8 byte per entry when counting. Work is split over threads
// in blocks of whole bytes. The 64-entries-per-instruction paths (AVX-512BW, AVX2) are picked at run time.
#include "common.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sparseopt {
namespace {

constexpr int64_t kGrainBytes = 1 << 14;  // packed bytes per task: 131,072 entries

// ---- pack: 8 bools (bytes 0/1) -> 1 byte ---------------------------------------------------------------------------
// The multiplication moves bit 0 of byte i to bit 56 + i.
SPARSEOPT_INLINE uint8_t pack8(const uint8_t* bools) {
  uint64_t word;
  std::memcpy(&word, bools, 8);
  return static_cast<uint8_t>((word * 0x0102040810204080ull) >> 56);
}

void pack_portable(const uint8_t* bools, uint8_t* packed, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) packed[i] = pack8(bools + 8 * i);
}

void unpack_portable(const uint8_t* packed, uint8_t* bools, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) {
    // Spread the byte over 8 bytes, keep bit j in byte j, and turn each nonzero byte into 1.
    const uint64_t bits = (packed[i] * 0x0101010101010101ull) & 0x8040201008040201ull;
    const uint64_t ones = ((bits + 0x7f7f7f7f7f7f7f7full) | bits) >> 7 & 0x0101010101010101ull;
    std::memcpy(bools + 8 * i, &ones, 8);
  }
}

#if defined(__x86_64__)
__attribute__((target("avx512bw"))) void pack_avx512(const uint8_t* bools, uint8_t* packed, int64_t bytes) {
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    // The input is read once, from memory: ask for it well ahead of the hardware's own prefetcher.
    __builtin_prefetch(bools + 8 * i + 4096, 0, 0);
    const __m512i v = _mm512_loadu_si512(bools + 8 * i);
    const uint64_t bits = _mm512_test_epi8_mask(v, v);
    std::memcpy(packed + i, &bits, 8);
  }
  pack_portable(bools + 8 * i, packed + i, bytes - i);
}

__attribute__((target("avx2"))) void pack_avx2(const uint8_t* bools, uint8_t* packed, int64_t bytes) {
  int64_t i = 0;
  for (; i + 4 <= bytes; i += 4) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bools + 8 * i));
    const uint32_t bits = _mm256_movemask_epi8(_mm256_cmpgt_epi8(v, _mm256_setzero_si256()));
    std::memcpy(packed + i, &bits, 4);
  }
  pack_portable(bools + 8 * i, packed + i, bytes - i);
}

__attribute__((target("avx512bw"))) void unpack_avx512(const uint8_t* packed, uint8_t* bools, int64_t bytes) {
  const __m512i one = _mm512_set1_epi8(1);
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t bits;
    std::memcpy(&bits, packed + i, 8);
    _mm512_storeu_si512(bools + 8 * i, _mm512_maskz_mov_epi8(bits, one));
  }
  unpack_portable(packed + i, bools + 8 * i, bytes - i);
}
#endif

using Convert = void (*)(const uint8_t*, uint8_t*, int64_t);

Convert best_pack() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bw")) return pack_avx512;
  if (__builtin_cpu_supports("avx2")) return pack_avx2;
#endif
  return pack_portable;
}

Convert best_unpack() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bw")) return unpack_avx512;
#endif
  return unpack_portable;
}

at::Tensor pack_mask(const at::Tensor& mask) {
  TORCH_CHECK(mask.scalar_type() == at::kBool, "pack_mask expects a bool tensor");
  const at::Tensor input = mask.contiguous();
  const int64_t n = input.numel(), whole = n / 8;
  at::Tensor result = at::empty({(n + 7) / 8}, input.options().dtype(at::kByte));
  advise_huge_pages(result);
  const auto* bools = static_cast<const uint8_t*>(input.const_data_ptr());
  auto* packed = result.mutable_data_ptr<uint8_t>();
  static const Convert pack = best_pack();
  at::parallel_for(0, whole, kGrainBytes, [&](int64_t begin, int64_t end) {
    pack(bools + 8 * begin, packed + begin, end - begin);
  });
  if (n % 8) {
    uint8_t last[8] = {0};
    std::memcpy(last, bools + 8 * whole, n % 8);
    packed[whole] = pack8(last);
  }
  return result;
}

at::Tensor unpack_mask(const at::Tensor& packed, int64_t numel) {
  TORCH_CHECK(packed.scalar_type() == at::kByte && packed.is_contiguous() && packed.numel() == (numel + 7) / 8,
              "unpack_mask expects a contiguous uint8[ceil(n/8)]");
  at::Tensor result = at::empty({numel}, packed.options().dtype(at::kBool));
  advise_huge_pages(result);
  const auto* bytes = packed.const_data_ptr<uint8_t>();
  auto* bools = static_cast<uint8_t*>(result.mutable_data_ptr());
  const int64_t whole = numel / 8;
  static const Convert unpack = best_unpack();
  at::parallel_for(0, whole, kGrainBytes, [&](int64_t begin, int64_t end) {
    unpack(bytes + begin, bools + 8 * begin, end - begin);
  });
  if (numel % 8) {
    uint8_t last[8];
    unpack_portable(bytes + whole, last, 1);
    std::memcpy(bools + 8 * whole, last, numel % 8);
  }
  return result;
}

// ---- counting ------------------------------------------------------------------------------------------------------
SPARSEOPT_CLONES int64_t count_bits(const uint8_t* bytes, int64_t size) {
  int64_t total = 0, i = 0;
  for (; i + 8 <= size; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    total += __builtin_popcountll(word);
  }
  for (; i < size; ++i) total += __builtin_popcount(bytes[i]);
  return total;
}

SPARSEOPT_CLONES void count_overlap(const uint8_t* a, const uint8_t* b, int64_t size, int64_t* both, int64_t* either) {
  int64_t intersection = 0, sum = 0, i = 0;
  for (; i + 8 <= size; i += 8) {
    uint64_t x, y;
    std::memcpy(&x, a + i, 8);
    std::memcpy(&y, b + i, 8);
    intersection += __builtin_popcountll(x & y);
    sum += __builtin_popcountll(x | y);
  }
  for (; i < size; ++i) {
    intersection += __builtin_popcount(a[i] & b[i]);
    sum += __builtin_popcount(a[i] | b[i]);
  }
  *both = intersection;
  *either = sum;
}

at::Tensor popcount(const at::Tensor& packed) {
  TORCH_CHECK(packed.scalar_type() == at::kByte && packed.is_contiguous(), "popcount expects a contiguous uint8 tensor");
  const auto* bytes = packed.const_data_ptr<uint8_t>();
  std::atomic<int64_t> total{0};
  at::parallel_for(0, packed.numel(), kGrainBytes, [&](int64_t begin, int64_t end) {
    total += count_bits(bytes + begin, end - begin);
  });
  at::Tensor result = at::empty({}, packed.options().dtype(at::kLong));
  *result.mutable_data_ptr<int64_t>() = total;
  return result;
}

at::Tensor mask_overlap(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(a.scalar_type() == at::kByte && b.scalar_type() == at::kByte && a.numel() == b.numel() &&
                  a.is_contiguous() && b.is_contiguous(),
              "mask_overlap expects two contiguous uint8 tensors of one length");
  const auto* x = a.const_data_ptr<uint8_t>();
  const auto* y = b.const_data_ptr<uint8_t>();
  std::atomic<int64_t> both{0}, either{0};
  at::parallel_for(0, a.numel(), kGrainBytes, [&](int64_t begin, int64_t end) {
    int64_t intersection, sum;
    count_overlap(x + begin, y + begin, end - begin, &intersection, &sum);
    both += intersection;
    either += sum;
  });
  at::Tensor result = at::empty({2}, a.options().dtype(at::kLong));
  auto* counts = result.mutable_data_ptr<int64_t>();
  counts[0] = both;
  counts[1] = either;
  return result;
}

// ---- packed -> indices -----------------------------------------------------------------------------------------------
// Two passes: count the bits of each block, then each block writes from its own offset. A word of sparse bits holds 0 to 3
// entries in no predictable pattern, so four are always written and the cursor moves by the true count (no branch to miss).
template <typename Index>
SPARSEOPT_INLINE void write_word(uint64_t word, int64_t first, Index*& out, Index* end) {
  const int count = __builtin_popcountll(word);
  if (__builtin_expect(end - out >= 4, 1)) {
    uint64_t rest = word;
    for (int j = 0; j < 4; ++j) {
      // The top bit stands in when nothing is left: ctz of zero would cost a branch.
      out[j] = static_cast<Index>(first + __builtin_ctzll(rest | (uint64_t{1} << 63)));
      rest &= rest - 1;
    }
    if (__builtin_expect(count > 4, 0)) {
      for (Index* cursor = out + 4; rest; rest &= rest - 1) *cursor++ = static_cast<Index>(first + __builtin_ctzll(rest));
    }
  } else {
    Index* cursor = out;
    for (; word; word &= word - 1) *cursor++ = static_cast<Index>(first + __builtin_ctzll(word));
  }
  out += count;
}

template <typename Index>
SPARSEOPT_INLINE void write_block(const uint8_t* bytes, int64_t begin, int64_t end, Index* out, Index* out_end) {
  int64_t i = begin;
  for (; i + 8 <= end; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    write_word(word, 8 * i, out, out_end);
  }
  for (; i < end; ++i) write_word<Index>(bytes[i], 8 * i, out, out_end);
}

SPARSEOPT_CLONES void write_block32(const uint8_t* bytes, int64_t begin, int64_t end, int32_t* out, int32_t* out_end) {
  write_block(bytes, begin, end, out, out_end);
}

SPARSEOPT_CLONES void write_block64(const uint8_t* bytes, int64_t begin, int64_t end, int64_t* out, int64_t* out_end) {
  write_block(bytes, begin, end, out, out_end);
}

at::Tensor mask_indices(const at::Tensor& packed, int64_t numel) {
  TORCH_CHECK(packed.scalar_type() == at::kByte && packed.is_contiguous() && packed.numel() == (numel + 7) / 8,
              "mask_indices expects a contiguous uint8[ceil(n/8)]");
  const auto* bytes = packed.const_data_ptr<uint8_t>();
  const int64_t size = packed.numel(), blocks = (size + kGrainBytes - 1) / kGrainBytes;
  std::vector<int64_t> first(blocks + 1, 0);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      first[b + 1] = count_bits(bytes + b * kGrainBytes, std::min(kGrainBytes, size - b * kGrainBytes));
    }
  });
  for (int64_t b = 0; b < blocks; ++b) first[b + 1] += first[b];

  const bool wide = numel > (int64_t{1} << 31);
  at::Tensor result = at::empty({first[blocks]}, packed.options().dtype(wide ? at::kLong : at::kInt));
  advise_huge_pages(result);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t low = b * kGrainBytes, high = std::min(low + kGrainBytes, size);
      if (wide) {
        auto* out = result.mutable_data_ptr<int64_t>();
        write_block64(bytes, low, high, out + first[b], out + first[b + 1]);
      } else {
        auto* out = result.mutable_data_ptr<int32_t>();
        write_block32(bytes, low, high, out + first[b], out + first[b + 1]);
      }
    }
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(sparseopt, CPU, m) {
  m.impl("pack_mask", &pack_mask);
  m.impl("unpack_mask", &unpack_mask);
  m.impl("popcount", &popcount);
  m.impl("mask_overlap", &mask_overlap);
  m.impl("mask_indices", &mask_indices);
}

}  // namespace sparseopt
