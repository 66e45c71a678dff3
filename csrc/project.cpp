// grad_project: per-sample weight gradients of a linear layer, projected, without the weight gradients.
//
//   out[b] = scale * sum_t (P g_bt) a_bt^T = scale * (G_b P^T)^T A_b
//
//   G: [B, T, d_out] and P: [k_o, d_out], A: [B, T, k_i], each fp32, bf16 or fp16 with a contiguous last dimension and any
//   other strides; out: fp32[B, k_o, k_i]. All arithmetic is fp32.
//
// G P^T is the work: a product with very few columns, for which a general matrix product took twice as long as this or more.
// P is packed once as [k_o / 16][d_out][16], so that one fused multiply-add serves 16 rows of P with one entry of G;
// 8 tokens at once fill the registers and reuse what is loaded of P. Threads take groups of 32 tokens of one sample; within
// a group 256 columns at a time (16 KB of packed P, read from the first-level cache; 16-bit rows are widened here). The
// second product is small and left to bmm. Each entry has one writer and a fixed order of sums: deterministic.
#include "simd.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>

namespace sparseopt {
namespace {

constexpr int64_t kRows = 8;      // tokens in registers
constexpr int64_t kGroup = 32;    // tokens of one task
constexpr int64_t kColumns = 256;

// This product may fuse multiply and add: it repeats no order of operations of torch's.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#endif
// out[r][0..16) += sum_d rows[r][d] * packed[d][0..16)
SPARSEOPT_CLONES void multiply(const float* const* rows, const float* packed, int64_t n, float* const* out) {
  const float *g0 = rows[0], *g1 = rows[1], *g2 = rows[2], *g3 = rows[3];
  const float *g4 = rows[4], *g5 = rows[5], *g6 = rows[6], *g7 = rows[7];
  Lanes s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, p;
  for (int64_t d = 0; d < n; ++d) {
    std::memcpy(&p, packed + d * kLanes, sizeof(p));
    s0 += g0[d] * p;
    s1 += g1[d] * p;
    s2 += g2[d] * p;
    s3 += g3[d] * p;
    s4 += g4[d] * p;
    s5 += g5[d] * p;
    s6 += g6[d] * p;
    s7 += g7[d] * p;
  }
  const Lanes* sums[kRows] = {&s0, &s1, &s2, &s3, &s4, &s5, &s6, &s7};
  for (int64_t r = 0; r < kRows; ++r) {
    std::memcpy(&p, out[r], sizeof(p));
    p += *sums[r];
    std::memcpy(out[r], &p, sizeof(p));
  }
}
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

SPARSEOPT_CLONES void widen_bf16(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(from[i]);
}

SPARSEOPT_CLONES void widen_half(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = half_to_float(from[i]);
}

template <typename T>
const float* widened(const T* from, int64_t n, float* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    return from;
  } else {
    const auto* bits = reinterpret_cast<const uint16_t*>(from);
    (std::is_same_v<T, c10::Half> ? widen_half : widen_bf16)(bits, n, buffer);
    return buffer;
  }
}

// [k_o, d_out] of any dtype -> fp32 [tiles, d_out, 16], rows past k_o zero.
at::Tensor pack(const at::Tensor& matrix) {
  const int64_t k = matrix.size(0), columns = matrix.size(1), tiles = (k + kLanes - 1) / kLanes;
  at::Tensor packed = at::zeros({tiles, columns, kLanes}, matrix.options().dtype(at::kFloat));
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * kLanes, count = std::min(kLanes, k - first);
    packed.select(0, tile).narrow(1, 0, count).copy_(matrix.narrow(0, first, count).t());
  }
  return packed;
}

// [B, T, d_out] -> fp32 [B, T, tiles * 16]
template <typename T>
at::Tensor times_packed(const at::Tensor& gradients, const at::Tensor& packed) {
  const int64_t batch = gradients.size(0), tokens = gradients.size(1), columns = gradients.size(2);
  const int64_t tiles = packed.size(0), width = tiles * kLanes, groups = (tokens + kGroup - 1) / kGroup;
  at::Tensor result = at::zeros({batch, tokens, width}, packed.options());
  const T* data = gradients.const_data_ptr<T>();
  const float* matrix = packed.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  const int64_t sample_stride = gradients.stride(0), token_stride = gradients.stride(1);
  at::parallel_for(0, batch * groups, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float buffer[std::is_same_v<T, float> ? 1 : kGroup * kColumns];
    float spare[kLanes] = {};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / groups, first = task % groups * kGroup, count = std::min(kGroup, tokens - first);
      const T* source = data + sample * sample_stride + first * token_stride;
      float* target = out + (sample * tokens + first) * width;
      for (int64_t column = 0; column < columns; column += kColumns) {
        const int64_t n = std::min(kColumns, columns - column);
        const float* rows[kGroup];
        for (int64_t t = 0; t < kGroup; ++t) {
          rows[t] = t < count ? widened(source + t * token_stride + column, n, buffer + t * kColumns) : rows[0];
        }
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const float* p = matrix + (tile * columns + column) * kLanes;
          for (int64_t t = 0; t < count; t += kRows) {
            float* sums[kRows];  // rows past the last repeat the first, into a spare place
            for (int64_t r = 0; r < kRows; ++r) sums[r] = t + r < count ? target + (t + r) * width + tile * kLanes : spare;
            multiply(rows + t, p, n, sums);
          }
        }
      }
    }
  });
  return result;
}

at::Tensor grad_project(const at::Tensor& gradients, const at::Tensor& inputs, const at::Tensor& matrix, double scale) {
  for (const at::Tensor* tensor : {&gradients, &inputs, &matrix}) {
    TORCH_CHECK(tensor->is_cpu() && (tensor->size(-1) <= 1 || tensor->stride(-1) == 1),
                "gradients, inputs and matrix must be on the CPU, with a contiguous last dimension");
  }
  TORCH_CHECK(gradients.dim() == 3 && inputs.dim() == 3 && matrix.dim() == 2 && inputs.size(0) == gradients.size(0) &&
                  inputs.size(1) == gradients.size(1) && matrix.size(1) == gradients.size(2),
              "expected gradients [B, T, d_out], inputs [B, T, k_i] and matrix [k_o, d_out], got ", gradients.sizes(), ", ",
              inputs.sizes(), " and ", matrix.sizes());
  const at::Tensor packed = pack(matrix);
  at::Tensor projected;
  switch (gradients.scalar_type()) {
    case at::kFloat: projected = times_packed<float>(gradients, packed); break;
    case at::kBFloat16: projected = times_packed<c10::BFloat16>(gradients, packed); break;
    case at::kHalf: projected = times_packed<c10::Half>(gradients, packed); break;
    default: TORCH_CHECK(false, "gradients must be fp32, bf16 or fp16, got ", gradients.scalar_type());
  }
  const at::Tensor result =
      at::bmm(projected.narrow(2, 0, matrix.size(0)).transpose(1, 2), inputs.to(at::kFloat)).contiguous();
  return result.mul_(scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(sparseopt, CPU, m) { m.impl("grad_project", &grad_project); }

}  // namespace sparseopt
