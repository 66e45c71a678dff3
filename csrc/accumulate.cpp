// accumulate_squares_: stored <- stored * decay + ((g * inverse) * weight) * (g * inverse), all tensors in one call.
//
//   stored: T tensors, fp32; grads: T tensors of one dtype (fp32, bf16, fp16, fp64) and of their sizes, an empty one means
//   "none": its tensor decays only; decay, inverse: fp32[] or absent. With inverse, what is not finite counts as 0.
//
// Threads take consecutive ranges of kRange entries. Memory bounds it: 10 bytes an entry with 16-bit gradients. Every
// operation is rounded in the order written (no fused multiply-adds), in fp32, or in fp64 for fp64 gradients after the
// product with decay: the bits are those of the reference. Each entry has one writer: deterministic.
#include "common.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace sparseopt {
namespace {

constexpr int64_t kRange = 1 << 15;

struct Numbers {
  float weight, decay, inverse;  // decay 1 multiplies nothing away
  bool scaled;                   // whether there is an inverse
};

template <typename Acc, typename T> SPARSEOPT_INLINE Acc widen(T value) { return static_cast<Acc>(value); }
template <> SPARSEOPT_INLINE float widen(c10::BFloat16 value) { return bf16_to_float(value.x); }

template <typename T, typename Acc, bool kScaled>
SPARSEOPT_INLINE void add_squares(const Numbers& k, int64_t n, const T* __restrict grad, float* __restrict stored) {
  const auto weight = static_cast<Acc>(k.weight), inverse = static_cast<Acc>(k.inverse);
  const float decay = k.decay;
  for (int64_t i = 0; i < n; ++i) {
    Acc g = widen<Acc>(grad[i]);
    if constexpr (kScaled) {
      g *= inverse;
      g = g - g == 0 ? g : 0;  // infinities and NaN leave a NaN
    }
    stored[i] = static_cast<float>(static_cast<Acc>(stored[i] * decay) + g * weight * g);
  }
}

// target_clones does not reach templates, so each variant is spelled out.
#define SPARSEOPT_ADD(NAME, T, ACC)                                                                      \
  SPARSEOPT_CLONES void NAME(const Numbers& k, int64_t n, const T* grad, float* stored) {                \
    if (k.scaled) add_squares<T, ACC, true>(k, n, grad, stored);                                         \
    else add_squares<T, ACC, false>(k, n, grad, stored);                                                 \
  }
SPARSEOPT_ADD(add_f32, float, float)
SPARSEOPT_ADD(add_bf16, c10::BFloat16, float)
SPARSEOPT_ADD(add_f16, c10::Half, float)
SPARSEOPT_ADD(add_f64, double, double)
#undef SPARSEOPT_ADD

SPARSEOPT_CLONES void multiply(float decay, int64_t n, float* stored) {
  for (int64_t i = 0; i < n; ++i) stored[i] *= decay;
}

struct Range {
  int64_t tensor, first;
};

template <typename T, typename Add>
void accumulate(at::TensorList stored, at::TensorList grads, const Numbers& k, bool decays, Add add) {
  std::vector<float*> targets;
  std::vector<const T*> sources;
  std::vector<Range> ranges;
  for (size_t t = 0; t < stored.size(); ++t) {
    const int64_t n = stored[t].numel();
    targets.push_back(n ? stored[t].mutable_data_ptr<float>() : nullptr);
    sources.push_back(grads[t].numel() ? grads[t].const_data_ptr<T>() : nullptr);
    if (!sources.back() && !decays) continue;
    for (int64_t first = 0; first < n; first += kRange) ranges.push_back({static_cast<int64_t>(t), first});
  }
  at::parallel_for(0, static_cast<int64_t>(ranges.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const auto [tensor, first] = ranges[r];
      const int64_t n = std::min(kRange, stored[tensor].numel() - first);
      if (sources[tensor]) {
        add(k, n, sources[tensor] + first, targets[tensor] + first);
      } else {
        multiply(k.decay, n, targets[tensor] + first);
      }
    }
  });
}

float number(const std::optional<at::Tensor>& tensor, const char* name) {
  if (!tensor) return 1.0f;
  TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == at::kFloat && tensor->numel() == 1, name,
              " must be one fp32 number on the CPU");
  return *tensor->const_data_ptr<float>();
}

void accumulate_squares_(at::TensorList stored, at::TensorList grads, double weight, const std::optional<at::Tensor>& decay,
                         const std::optional<at::Tensor>& inverse) {
  TORCH_CHECK(stored.size() == grads.size(), "expected a gradient for each of ", stored.size(), " accumulators, got ",
              grads.size());
  at::ScalarType dtype = at::kFloat;  // where every gradient is absent
  bool any = false;
  for (size_t t = 0; t < stored.size(); ++t) {
    TORCH_CHECK(stored[t].is_cpu() && stored[t].is_contiguous() && stored[t].scalar_type() == at::kFloat,
                "accumulators must be contiguous fp32 on the CPU");
    if (!grads[t].numel()) continue;
    TORCH_CHECK(grads[t].is_cpu() && grads[t].is_contiguous(), "gradients must be contiguous and on the CPU");
    TORCH_CHECK(grads[t].numel() == stored[t].numel(), "gradient ", t, " must have ", stored[t].numel(),
                " entries or none, got ", grads[t].numel());
    TORCH_CHECK(!any || grads[t].scalar_type() == dtype, "gradients must be of one dtype, got ", dtype, " and ",
                grads[t].scalar_type());
    dtype = grads[t].scalar_type();
    any = true;
  }
  const Numbers k{static_cast<float>(weight), number(decay, "decay"), number(inverse, "inverse"), inverse.has_value()};
  switch (dtype) {
    case at::kFloat: return accumulate<float>(stored, grads, k, decay.has_value(), add_f32);
    case at::kBFloat16: return accumulate<c10::BFloat16>(stored, grads, k, decay.has_value(), add_bf16);
    case at::kHalf: return accumulate<c10::Half>(stored, grads, k, decay.has_value(), add_f16);
    case at::kDouble: return accumulate<double>(stored, grads, k, decay.has_value(), add_f64);
    default: TORCH_CHECK(false, "gradients must be fp32, bf16, fp16 or fp64, got ", dtype);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(sparseopt, CPU, m) { m.impl("accumulate_squares_", &accumulate_squares_); }

}  // namespace sparseopt
