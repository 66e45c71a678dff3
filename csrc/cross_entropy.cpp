// cross_entropy_: losses of rows of logits, and in place of the logits their gradient.
//
//   loss_n = log(sum_v exp(x_nv)) - x_n,target;    x_nv <- exp(x_nv) / sum_v exp(x_nv) - [v = target]
//
//   logits: [N, V] fp32, bf16 or fp16, any row stride; targets: int64[N]; losses: fp32[N]. Arithmetic in fp32, the sum of a
//   row's 16 lanes in fp64.
//
// Threads take consecutive rows. A row is read from memory once: its largest entry, its exponentials (in place for fp32, in
// a buffer for 16 bits) and the division by their sum are three passes over what the second-level cache holds by then.
// One writer per entry, a fixed order of sums: deterministic.
#include "simd.h"

#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace sparseopt {
namespace {

// ---- passes over a row -----------------------------------------------------------------------------------------------
SPARSEOPT_CLONES float largest(const float* x, int64_t n) {
  const float lowest = -std::numeric_limits<float>::infinity();
  Lanes a = Lanes{} + lowest, b = a, value;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    load(value, x + i);
    a = value > a ? value : a;
    load(value, x + i + kLanes);
    b = value > b ? value : b;
  }
  for (; i < n; i += kLanes) {
    load_tail(value, x + i, std::min(kLanes, n - i), lowest);
    a = value > a ? value : a;
  }
  a = a > b ? a : b;
  float result = lowest;
  for (int64_t j = 0; j < kLanes; ++j) result = a[j] > result ? a[j] : result;
  return result;
}

// x <- exp(x - shift); returns the sum. Sums of at most 64 terms are fp32.
SPARSEOPT_CLONES double exponentials(float* x, int64_t n, float shift) {
  constexpr int64_t kBlock = 64 * kLanes;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    Lanes sums{}, value;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      load(value, x + i);
      value = value - shift;
      exp_lanes(value);
      store(x + i, value);
      sums += value;
    }
    if (i < end) {
      load_tail(value, x + i, end - i, -std::numeric_limits<float>::infinity());
      value = value - shift;
      exp_lanes(value);
      std::memcpy(x + i, &value, (end - i) * sizeof(float));
      for (int64_t j = 0; j < end - i; ++j) total += value[j];
    }
    double block = 0;
    for (int64_t j = 0; j < kLanes; ++j) block += sums[j];
    total += block;
  }
  return total;
}

SPARSEOPT_CLONES void multiply(float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

SPARSEOPT_CLONES void widen_bf16(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(from[i]);
}

SPARSEOPT_CLONES void widen_half(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = half_to_float(from[i]);
}

SPARSEOPT_CLONES void narrow_bf16(const float* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = float_to_bf16(from[i]);
}

SPARSEOPT_CLONES void narrow_half(const float* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = c10::detail::fp16_ieee_from_fp32_value(from[i]);
}

// ---- rows ------------------------------------------------------------------------------------------------------------
float loss_and_gradient(float* x, int64_t n, int64_t target) {
  const bool inside = target >= 0 && target < n;
  const float picked = inside ? x[target] : std::numeric_limits<float>::quiet_NaN();
  const float shift = largest(x, n);
  const double sum = exponentials(x, n, shift);
  // A target outside the row: NaN, as where nobody can raise an error.
  multiply(x, n, inside ? static_cast<float>(1.0 / sum) : picked);
  if (inside) x[target] -= 1.0f;
  return static_cast<float>(std::log(sum)) + shift - picked;
}

template <typename T>
void rows(const at::Tensor& logits, const int64_t* targets, int64_t ignore_index, float* losses) {
  T* data = logits.mutable_data_ptr<T>();
  const int64_t count = logits.size(0), width = logits.size(1), stride = logits.stride(0);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(sizeof(T) == 2 ? width : 0);
    for (int64_t row = begin; row < end; ++row) {
      T* x = data + row * stride;
      if (targets[row] == ignore_index) {
        std::memset(static_cast<void*>(x), 0, width * sizeof(T));
        losses[row] = 0;
      } else if constexpr (std::is_same_v<T, float>) {
        losses[row] = loss_and_gradient(x, width, targets[row]);
      } else {
        constexpr bool half = std::is_same_v<T, c10::Half>;
        auto* bits = reinterpret_cast<uint16_t*>(x);
        (half ? widen_half : widen_bf16)(bits, width, buffer.data());
        losses[row] = loss_and_gradient(buffer.data(), width, targets[row]);
        (half ? narrow_half : narrow_bf16)(buffer.data(), width, bits);
      }
    }
  });
}

at::Tensor cross_entropy_(at::Tensor logits, const at::Tensor& targets, int64_t ignore_index) {
  TORCH_CHECK(logits.dim() == 2 && (logits.stride(1) == 1 || logits.size(1) <= 1),
              "logits must be [N, V] with a contiguous last dimension");
  TORCH_CHECK(targets.is_cpu() && targets.scalar_type() == at::kLong && targets.dim() == 1 && targets.is_contiguous() &&
                  targets.size(0) == logits.size(0),
              "targets must be a contiguous int64[", logits.size(0), "] on the CPU");
  at::Tensor losses = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  const auto* chosen = targets.const_data_ptr<int64_t>();
  auto* out = losses.mutable_data_ptr<float>();
  switch (logits.scalar_type()) {
    case at::kFloat: rows<float>(logits, chosen, ignore_index, out); break;
    case at::kBFloat16: rows<c10::BFloat16>(logits, chosen, ignore_index, out); break;
    case at::kHalf: rows<c10::Half>(logits, chosen, ignore_index, out); break;
    default: TORCH_CHECK(false, "logits must be fp32, bf16 or fp16, got ", logits.scalar_type());
  }
  return losses;
}

}  // namespace

TORCH_LIBRARY_IMPL(sparseopt, CPU, m) { m.impl("cross_entropy_", &cross_entropy_); }

}  // namespace sparseopt
