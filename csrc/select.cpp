// select_entries: of each tensor, the active entries of smallest |score|, or the inactive ones of largest; exact counts.
//
//   scores: T tensors of one dtype (fp32, bf16, fp16, fp64); packed: uint8[B], their masks one behind the other
//   (sparseopt/_schema.py); counts: int64[T]; seeds: int64[T] or absent: random scores.
//
// Every score becomes a key, a whole number of 15 (16-bit scores), 31 or 24 (random) bits: the bits of |score|, subtracted
// from their largest value where the smallest is wanted, so that the largest keys are chosen. Radix selection, tensor by
// tensor: the first pass counts the keys' first 11 bits, the second one collects the keys that begin as the last chosen one
// does, mostly a few in a hundred, which tell its other bits and the ties of every range; the third one writes the bytes.
// Threads take ranges of entries; what they add up is whole numbers, and squares are added in the order of ranges:
// deterministic.
#include "common.h"

#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

namespace sparseopt {
namespace {

constexpr int64_t kRange = 1 << 15, kTile = 512, kAlignment = 64;
constexpr int kDigit = 11, kBins = 1 << kDigit;

using Bins = std::array<int64_t, kBins>;

uint32_t finalise(uint32_t x) {  // of MurmurHash3
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// |score| as the bits of a number that is not negative; the bits of infinity.
template <typename T> struct Bits;
template <> struct Bits<float> {
  static constexpr int kBits = 31;
  static constexpr uint32_t kInfinity = 0x7f800000u, kClamp = 0x7f7fffffu;
  SPARSEOPT_INLINE static uint32_t of(float x) { return std::bit_cast<uint32_t>(x) & 0x7fffffffu; }
};
template <> struct Bits<double> : Bits<float> {
  SPARSEOPT_INLINE static uint32_t of(double x) { return Bits<float>::of(static_cast<float>(x)); }
};
template <> struct Bits<c10::BFloat16> {
  static constexpr int kBits = 15;
  static constexpr uint32_t kInfinity = 0x7f80u, kClamp = 0x7fffu;  // no 16-bit number ties with an infinity
  SPARSEOPT_INLINE static uint32_t of(c10::BFloat16 x) { return x.x & 0x7fffu; }
};
template <> struct Bits<c10::Half> {
  static constexpr int kBits = 15;
  static constexpr uint32_t kInfinity = 0x7c00u, kClamp = 0x7fffu;
  SPARSEOPT_INLINE static uint32_t of(c10::Half x) { return x.x & 0x7fffu; }
};

// The keys of one tensor; T = void: random ones.
template <typename T, bool kGrow> struct Keys {
  static constexpr int kBits = Bits<T>::kBits;
  static constexpr bool kRandom = false;
  const T* scores;

  SPARSEOPT_INLINE uint32_t at(int64_t i) const {
    const uint32_t bits = Bits<T>::of(scores[i]);
    if constexpr (kGrow) return bits >= Bits<T>::kInfinity ? 0 : bits;
    else return ((1u << kBits) - 1) - (bits > Bits<T>::kInfinity ? bits : std::min(bits, Bits<T>::kClamp));
  }
  SPARSEOPT_INLINE bool odd(int64_t i, bool eligible) const {
    const uint32_t bits = Bits<T>::of(scores[i]);
    return kGrow ? bits >= Bits<T>::kInfinity : eligible && bits > Bits<T>::kInfinity;
  }
  SPARSEOPT_INLINE float value(int64_t i) const {
    return Bits<T>::of(scores[i]) >= Bits<T>::kInfinity ? 0.0f : static_cast<float>(scores[i]);
  }
};

template <bool kGrow> struct Keys<void, kGrow> {
  static constexpr int kBits = 24;
  static constexpr bool kRandom = true;
  uint64_t seed;

  SPARSEOPT_INLINE uint32_t at(int64_t i) const {
    const auto low = static_cast<uint32_t>(i), high = static_cast<uint32_t>(i >> 32);
    const uint32_t x = low * 0x9e3779b1u + high * 0x85ebca77u + static_cast<uint32_t>(seed);
    return finalise(finalise(x) + static_cast<uint32_t>(seed >> 32)) >> 8;
  }
  SPARSEOPT_INLINE bool odd(int64_t, bool) const { return false; }
  SPARSEOPT_INLINE float value(int64_t) const { return 0.0f; }
};

struct Found {
  int64_t odd = 0;
  double squares = 0;
};

template <typename K, bool kGrow> class Selection {
 public:
  Selection(const K& keys, int64_t n, const uint8_t* packed) : keys_(keys), n_(n), packed_(packed) {}

  Found run(int64_t count, uint8_t* chosen) {
    const int64_t ranges = (n_ + kRange - 1) / kRange;
    Found found;
    int shift = K::kBits - kDigit;
    int64_t left = count;
    auto prefix = static_cast<uint32_t>(last_digit(first_digits(ranges, shift, count > 0, found), left));
    if (count <= 0) return found;
    // Few keys begin like the last chosen one: from here on only these.
    std::vector<std::vector<uint32_t>> alike(ranges);
    at::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
      std::vector<uint32_t> keys(kRange + 8);
      for (int64_t r = begin; r < end; ++r) {
        int64_t number = 0;
        each(r, [&](int64_t i, uint32_t mine) {
          keys[number] = keys_.at(i);
          number += mine & static_cast<uint32_t>((keys[number] >> shift) == prefix);
        });
        alike[r].assign(keys.begin(), keys.begin() + number);
      }
    });
    while (shift > 0) {
      const int width = std::min(kDigit, shift);
      shift -= width;
      Bins bins{};
      for (const auto& keys : alike) {
        for (const uint32_t key : keys) bins[(key >> shift) & ((1u << width) - 1)] += (key >> shift >> width) == prefix;
      }
      prefix = (prefix << width) | static_cast<uint32_t>(last_digit(bins, left));
    }
    std::vector<int64_t> before(ranges + 1, 0);
    for (int64_t r = 0; r < ranges; ++r) {
      before[r + 1] = before[r] + std::count(alike[r].begin(), alike[r].end(), prefix);
    }
    at::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) pick(r, prefix, left - before[r], chosen);
    });
    return found;
  }

 private:
  // Calls visit(entry, 1 where it can be chosen, else 0) for the entries of a range.
  template <typename Visit> SPARSEOPT_INLINE void each(int64_t range, Visit visit) const {
    const int64_t last = std::min(n_, (range + 1) * kRange);
    for (int64_t first = range * kRange; first < last; first += 8) {
      const uint32_t candidates = kGrow ? ~packed_[first >> 3] : packed_[first >> 3];
      const int64_t lanes = std::min<int64_t>(8, last - first);
      for (int64_t j = 0; j < lanes; ++j) visit(first + j, (candidates >> j) & 1u);
    }
  }

  // The digit of the last of ``left`` keys; takes those with a larger one off ``left``.
  static int last_digit(const Bins& bins, int64_t& left) {
    int digit = kBins - 1;
    while (digit > 0 && bins[digit] < left) left -= bins[digit--];
    return digit;
  }

  // Counts the first digits, and what is to be known of all scores.
  Bins first_digits(int64_t ranges, int shift, bool count, Found& found) const {
    Bins total{};
    std::mutex lock;
    std::vector<Found> parts(ranges);
    at::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
      // Four of each, in turns: an addition need not wait for the one before. One more for what cannot be chosen.
      std::vector<int64_t> bins(4 * (kBins + 4), 0);
      for (int64_t r = begin; r < end; ++r) {
        std::array<float, 8> lanes{};
        std::array<double, 8> squares{};
        int64_t odd = 0;
        each(r, [&](int64_t i, uint32_t mine) {
          if (count) {
            const uint32_t digit = keys_.at(i) >> shift;
            ++bins[4 * (mine ? digit : kBins + (i >> 2 & 3)) + (i & 3)];
          }
          odd += keys_.odd(i, mine);
          if constexpr (kGrow && !K::kRandom) {
            const float value = mine ? keys_.value(i) : 0.0f;
            lanes[i & 7] += value * value;
            if ((i & (kTile - 1)) == kTile - 1) {
              for (int lane = 0; lane < 8; ++lane) squares[lane] += lanes[lane], lanes[lane] = 0;
            }
          }
        });
        parts[r].odd = odd;
        for (int lane = 0; lane < 8; ++lane) parts[r].squares += squares[lane] + lanes[lane];
      }
      const std::lock_guard<std::mutex> guard(lock);
      for (int d = 0; d < kBins; ++d) total[d] += bins[4 * d] + bins[4 * d + 1] + bins[4 * d + 2] + bins[4 * d + 3];
    });
    for (const Found& part : parts) found.odd += part.odd, found.squares += part.squares;
    return total;
  }

  // The first ``quota`` ties of a range (any number, negative too), and what is above them.
  void pick(int64_t range, uint32_t key, int64_t quota, uint8_t* chosen) const {
    const int64_t last = std::min(n_, (range + 1) * kRange);
    for (int64_t first = range * kRange; first < last; first += 8) {
      const int lanes = static_cast<int>(std::min<int64_t>(8, last - first));
      uint32_t above = 0, equal = 0;
      for (int j = 0; j < lanes; ++j) {
        const uint32_t mine = keys_.at(first + j);
        above |= static_cast<uint32_t>(mine > key) << j;
        equal |= static_cast<uint32_t>(mine == key) << j;
      }
      const uint32_t candidates = (kGrow ? ~packed_[first >> 3] : packed_[first >> 3]) & 0xffu;
      uint32_t taken = above & candidates;
      for (uint32_t rest = equal & candidates; rest; rest &= rest - 1) {
        if (quota-- > 0) taken |= rest & (~rest + 1);
      }
      chosen[first >> 3] = static_cast<uint8_t>(taken);
    }
  }

  K keys_;
  int64_t n_;
  const uint8_t* packed_;
};

template <typename T, bool kGrow>
Found select(const at::Tensor& scores, const uint8_t* packed, int64_t count, const int64_t* seed, uint8_t* chosen) {
  if (seed) {
    const Keys<void, kGrow> keys{static_cast<uint64_t>(*seed)};
    return Selection<Keys<void, kGrow>, kGrow>(keys, scores.numel(), packed).run(count, chosen);
  }
  const Keys<T, kGrow> keys{scores.const_data_ptr<T>()};
  return Selection<Keys<T, kGrow>, kGrow>(keys, scores.numel(), packed).run(count, chosen);
}

template <bool kGrow>
Found select(const at::Tensor& scores, const uint8_t* packed, int64_t count, const int64_t* seed, uint8_t* chosen) {
  switch (scores.scalar_type()) {
    case at::kFloat: return select<float, kGrow>(scores, packed, count, seed, chosen);
    case at::kBFloat16: return select<c10::BFloat16, kGrow>(scores, packed, count, seed, chosen);
    case at::kHalf: return select<c10::Half, kGrow>(scores, packed, count, seed, chosen);
    case at::kDouble: return select<double, kGrow>(scores, packed, count, seed, chosen);
    default: TORCH_CHECK(false, "scores must be fp32, bf16, fp16 or fp64, got ", scores.scalar_type());
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> select_entries(at::TensorList scores, const at::Tensor& packed,
                                                              const at::Tensor& counts, bool grow,
                                                              const std::optional<at::Tensor>& seeds) {
  const auto tensors = static_cast<int64_t>(scores.size());
  const auto fits = [&](const at::Tensor& vector) {
    return vector.is_cpu() && vector.scalar_type() == at::kLong && vector.is_contiguous() && vector.dim() == 1 &&
           vector.numel() == tensors;
  };
  TORCH_CHECK(fits(counts) && (!seeds || fits(*seeds)), "counts and seeds must be int64[", tensors, "] on the CPU");
  int64_t bytes = 0;
  for (const at::Tensor& tensor : scores) {
    TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == scores[0].scalar_type(),
                "scores must be contiguous, on the CPU and of one dtype");
    bytes += (tensor.numel() + 8 * kAlignment - 1) / (8 * kAlignment) * kAlignment;
  }
  TORCH_CHECK(packed.is_cpu() && packed.is_contiguous() && packed.scalar_type() == at::kByte && packed.numel() == bytes,
              "the masks of these tensors take ", bytes, " bytes of one vector, got ", packed.numel());
  at::Tensor chosen = at::zeros_like(packed), odd = at::zeros_like(counts);
  at::Tensor squares = at::zeros({}, counts.options().dtype(at::kDouble));
  double total = 0;
  int64_t begin = 0;
  for (int64_t t = 0; t < tensors; ++t) {
    const at::Tensor& tensor = scores[t];
    if (!tensor.numel()) continue;
    const int64_t count = counts.const_data_ptr<int64_t>()[t];
    const int64_t* seed = seeds ? seeds->const_data_ptr<int64_t>() + t : nullptr;
    const uint8_t* mask = packed.const_data_ptr<uint8_t>() + begin;
    uint8_t* out = chosen.mutable_data_ptr<uint8_t>() + begin;
    const Found found =
        grow ? select<true>(tensor, mask, count, seed, out) : select<false>(tensor, mask, count, seed, out);
    odd.mutable_data_ptr<int64_t>()[t] = found.odd;
    total += found.squares;
    begin += (tensor.numel() + 8 * kAlignment - 1) / (8 * kAlignment) * kAlignment;
  }
  *squares.mutable_data_ptr<double>() = total;
  return {chosen, odd, squares};
}

}  // namespace

TORCH_LIBRARY_IMPL(sparseopt, CPU, m) { m.impl("select_entries", &select_entries); }

}  // namespace sparseopt
