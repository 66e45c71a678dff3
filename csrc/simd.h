// Sixteen floats at a time through the compiler's vector types: each clone (common.h) lowers them to its own width.
#pragma once

#include "common.h"

#include <c10/util/Half.h>

namespace sparseopt {

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t LaneBits __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16;

SPARSEOPT_INLINE void load(Lanes& value, const float* from) { std::memcpy(&value, from, sizeof(Lanes)); }
SPARSEOPT_INLINE void store(float* to, const Lanes& value) { std::memcpy(to, &value, sizeof(Lanes)); }

// The tail of a row: `count` < 16 entries, the rest `fill`.
SPARSEOPT_INLINE void load_tail(Lanes& value, const float* from, int64_t count, float fill) {
  value = Lanes{} + fill;
  std::memcpy(&value, from, count * sizeof(float));
}

// exp for arguments <= 0, to about 1e-7 (Cephes): 2^n e^r with |r| <= ln(2) / 2. Below -87 (results under 2^-126) it is
// 0, -inf included; NaN stays NaN.
SPARSEOPT_INLINE void exp_lanes(Lanes& x) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  const Lanes rounded = x * 1.44269504088896341f + kRound;
  const Lanes n = rounded - kRound;
  const Lanes r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  LaneBits bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  bits = (bits - (0x4B400000 - 127)) << 23;
  Lanes power;
  std::memcpy(&power, &bits, sizeof(bits));
  x = x < -87.0f ? Lanes{} : p * power;
}

SPARSEOPT_INLINE float half_to_float(uint16_t bits) {
  // Exponents are 112 apart; a subnormal becomes one of fp32 first, and the product makes it normal, exactly.
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  const float value = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | special | (static_cast<uint32_t>(bits & 0x8000u) << 16));
}

}  // namespace sparseopt
