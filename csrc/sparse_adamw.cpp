// sparse_adamw_: one AdamW step (decoupled weight decay) on the active entries of all tensors.
//
//   w <- w * (1 - lr * weight_decay)
//   m <- m + (1 - beta1) * (g - m);   v <- beta2 * v + (1 - beta2) * g * g
//   w <- w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)          t: age of the entry
//
//   params, grads: T tensors of one dtype; moments fp32[N] (fp64[N] for fp64) in arena order; master weights of 16-bit
//   parameters as residual int16[N] (what the weights lack of them) or master fp32[N] (a copy: weights are not read)
//
// Work: threads take consecutive chunks and walk them in tiles of kTile entries (tiles.h). A tile gathers weights and
// gradients into L1 buffers, does the arithmetic there in wide registers, and scatters the weights back; the loads of the
// next tile are already in flight. Only touched cache lines move: at density d of 4-byte weights 1 - (1 - d)^16 of them.
// Each entry belongs to one thread: deterministic, whatever the number of threads.
#include "tiles.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <vector>

namespace sparseopt {
namespace {

// Constants of one tensor and step, in the arithmetic's precision.
template <typename Acc>
struct Constants {
  Acc decay, one_minus_beta1, beta2, one_minus_beta2, eps, sign, step_size, root;
  bool amsgrad;
};

// ---- arithmetic on tile buffers ------------------------------------------------------------------------------------
// kAges: step_size and root vary by entry (cohorts).
template <typename Acc, bool kAges>
SPARSEOPT_INLINE void step_tile(const Constants<Acc>& c, int64_t n, const Acc* __restrict g, Acc* __restrict w,
                                Acc* __restrict m, Acc* __restrict v, Acc* __restrict v_max,
                                const Acc* __restrict step_size, const Acc* __restrict root) {
  if (v_max != nullptr && c.amsgrad) {
    for (int64_t i = 0; i < n; ++i) {
      const Acc grad = g[i] * c.sign;
      const Acc first = m[i] + c.one_minus_beta1 * (grad - m[i]);
      const Acc second = v[i] * c.beta2 + c.one_minus_beta2 * grad * grad;
      // NaN wins on either side, as in torch.maximum.
      const Acc largest = (v_max[i] > second) | (v_max[i] != v_max[i]) ? v_max[i] : second;
      m[i] = first, v[i] = second, v_max[i] = largest;
      const Acc denominator = std::sqrt(largest) / (kAges ? root[i] : c.root) + c.eps;
      w[i] = w[i] * c.decay - (kAges ? step_size[i] : c.step_size) * (first / denominator);
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const Acc grad = g[i] * c.sign;
    const Acc first = m[i] + c.one_minus_beta1 * (grad - m[i]);
    const Acc second = v[i] * c.beta2 + c.one_minus_beta2 * grad * grad;
    m[i] = first, v[i] = second;
    const Acc denominator = std::sqrt(second) / (kAges ? root[i] : c.root) + c.eps;
    w[i] = w[i] * c.decay - (kAges ? step_size[i] : c.step_size) * (first / denominator);
  }
}

// target_clones does not reach templates, so each variant that matters for speed is spelled out.
#define SPARSEOPT_STEP(NAME, ACC, AGES)                                                                               \
  SPARSEOPT_CLONES void NAME(const Constants<ACC>& c, int64_t n, const ACC* g, ACC* w, ACC* m, ACC* v, ACC* v_max,    \
                             const ACC* step_size, const ACC* root) {                                                 \
    step_tile<ACC, AGES>(c, n, g, w, m, v, v_max, step_size, root);                                                   \
  }
SPARSEOPT_STEP(step_f32, float, false)
SPARSEOPT_STEP(step_f32_ages, float, true)
SPARSEOPT_STEP(step_f64, double, false)
SPARSEOPT_STEP(step_f64_ages, double, true)
#undef SPARSEOPT_STEP

// ---- 16-bit weights: widen, and master weights as weight + residual --------------------------------------------------
// residual r = bits(master) - bits(float(w)), an int16: see join_master in sparseopt/reference.py.
template <typename T> SPARSEOPT_INLINE float widen(T value) { return static_cast<float>(value); }
template <> SPARSEOPT_INLINE float widen(c10::BFloat16 value) { return bf16_to_float(value.x); }
template <typename T> SPARSEOPT_INLINE T narrow(float value) { return static_cast<T>(value); }
template <> SPARSEOPT_INLINE c10::BFloat16 narrow(float value) { return {float_to_bf16(value), c10::BFloat16::from_bits()}; }

template <typename T> constexpr int32_t kResidualLimit = 0;
template <> constexpr int32_t kResidualLimit<c10::BFloat16> = (1 << 15) - 1;
template <> constexpr int32_t kResidualLimit<c10::Half> = (1 << 12) - 1;

template <typename T>
SPARSEOPT_INLINE void widen_tile(const T* raw, const int16_t* residual, float* w, int64_t n) {
  if (residual == nullptr) {
    for (int64_t i = 0; i < n; ++i) w[i] = widen(raw[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) w[i] = std::bit_cast<float>(std::bit_cast<int32_t>(widen(raw[i])) + residual[i]);
  }
}

template <typename T>
SPARSEOPT_INLINE void narrow_tile(const float* w, T* raw, int16_t* residual, int64_t n) {
  for (int64_t i = 0; i < n; ++i) raw[i] = narrow<T>(w[i]);
  if (residual == nullptr) return;
  constexpr int32_t limit = kResidualLimit<T>;
  for (int64_t i = 0; i < n; ++i) {
    // Same sign on both sides, so the difference cannot overflow; unsigned arithmetic keeps NaNs defined.
    const auto difference = static_cast<int32_t>(std::bit_cast<uint32_t>(w[i]) - std::bit_cast<uint32_t>(widen(raw[i])));
    residual[i] = static_cast<int16_t>(std::clamp(difference, -limit, limit));
  }
}

SPARSEOPT_CLONES void widen_bf16(const c10::BFloat16* raw, const int16_t* residual, float* w, int64_t n) {
  widen_tile(raw, residual, w, n);
}
SPARSEOPT_CLONES void narrow_bf16(const float* w, c10::BFloat16* raw, int16_t* residual, int64_t n) {
  narrow_tile(w, raw, residual, n);
}
SPARSEOPT_CLONES void widen_f16(const c10::Half* raw, const int16_t* residual, float* w, int64_t n) {
  widen_tile(raw, residual, w, n);
}
SPARSEOPT_CLONES void narrow_f16(const float* w, c10::Half* raw, int16_t* residual, int64_t n) {
  narrow_tile(w, raw, residual, n);
}

// Load a tile as Acc and back; fp32 and fp64 need no conversion.
template <typename T, typename Acc> struct Codec {
  static void widen(const T* raw, const int16_t*, Acc* w, int64_t n) { std::memcpy(w, raw, n * sizeof(T)); }
  static void narrow(const Acc* w, T* raw, int16_t*, int64_t n) { std::memcpy(raw, w, n * sizeof(T)); }
};
template <> struct Codec<c10::BFloat16, float> {
  static constexpr auto widen = widen_bf16;
  static constexpr auto narrow = narrow_bf16;
};
template <> struct Codec<c10::Half, float> {
  static constexpr auto widen = widen_f16;
  static constexpr auto narrow = narrow_f16;
};

void step(const Constants<float>& c, int64_t n, const float* g, float* w, float* m, float* v, float* v_max,
          const float* step_size, const float* root) {
  (step_size ? step_f32_ages : step_f32)(c, n, g, w, m, v, v_max, step_size, root);
}
void step(const Constants<double>& c, int64_t n, const double* g, double* w, double* m, double* v, double* v_max,
          const double* step_size, const double* root) {
  (step_size ? step_f64_ages : step_f64)(c, n, g, w, m, v, v_max, step_size, root);
}

// ---- one call --------------------------------------------------------------------------------------------------------
template <typename T, typename Acc, typename Index>
struct Job {
  const Chunk* rows;
  const Index* indices;
  std::vector<T*> params;
  std::vector<const T*> grads;  // all null with compact gradients
  const Acc* compact;
  Acc *m, *v, *v_max;
  int16_t* residual;
  Acc* master;
  bool follow;
  const uint8_t* cohorts;
  std::vector<Constants<Acc>> constants;       // by tensor
  std::vector<Acc> step_sizes, roots;          // by tensor and cohort
  int64_t cohort_count = 0;

  void prefetch(const Tile& tile) const {
    const Chunk& chunk = rows[tile.chunk];
    prefetch_tile(params[chunk.tensor], chunk, tile, indices);
    prefetch_tile(grads[chunk.tensor], chunk, tile, indices);
  }

  void run(int64_t begin, int64_t end) const {
    TileWalk walk(rows, begin, end), ahead(rows, begin, end);
    if (!ahead.done()) prefetch(ahead.take());
    alignas(kLine) T raw[kTile];
    alignas(kLine) Acc weights[kTile], gradients[kTile], step_size[kTile], root[kTile];
    while (!walk.done()) {
      if (!ahead.done()) prefetch(ahead.take());
      const Tile tile = walk.take();
      const Chunk& chunk = rows[tile.chunk];
      T* param = params[chunk.tensor];
      if (param == nullptr) continue;
      const T* grad = grads[chunk.tensor];
      const int64_t first = chunk.start + tile.offset, n = tile.count;
      int16_t* rest = residual ? residual + first : nullptr;
      const Acc* g = gradients;
      Acc* w = weights;
      bool in_place = false;
      if constexpr (std::is_same_v<T, Acc>) {
        in_place = is_contiguous(chunk);
        if (in_place) {
          w = param + first_element(chunk, tile, indices);
          if (grad != nullptr) g = grad + first_element(chunk, tile, indices);
        }
      }
      if (compact != nullptr) {
        g = compact + first;
      } else if (!in_place) {
        load_tile(grad, chunk, tile, indices, raw);
        Codec<T, Acc>::widen(raw, nullptr, gradients, n);
      }
      if (master != nullptr) {
        w = master + first;
        if (follow) {
          load_tile(const_cast<const T*>(param), chunk, tile, indices, raw);
          Codec<T, Acc>::widen(raw, nullptr, weights, n);
          Codec<T, Acc>::narrow(w, raw, nullptr, n);
          for (int64_t i = 0; i < n; ++i) w[i] = static_cast<Acc>(raw[i]) == weights[i] ? w[i] : weights[i];
        }
      } else if (!in_place) {
        load_tile(const_cast<const T*>(param), chunk, tile, indices, raw);
        Codec<T, Acc>::widen(raw, rest, w, n);
      }
      if (cohorts != nullptr) {
        const int64_t row = chunk.tensor * cohort_count;
        for (int64_t i = 0; i < n; ++i) {
          step_size[i] = step_sizes[row + cohorts[first + i]];
          root[i] = roots[row + cohorts[first + i]];
        }
      }
      step(constants[chunk.tensor], n, g, w, m + first, v + first, v_max ? v_max + first : nullptr,
           cohorts ? step_size : nullptr, cohorts ? root : nullptr);
      if (!in_place) {
        Codec<T, Acc>::narrow(w, raw, rest, n);
        store_tile(param, chunk, tile, indices, raw);
      }
    }
  }
};

struct Hyper {  // one row of the table, see HYPER_COLUMNS in sparseopt/_schema.py
  double lr, beta1, beta2, eps, weight_decay, maximize, correct_bias, amsgrad;
};
static_assert(sizeof(Hyper) == 8 * sizeof(double));

template <typename Acc>
void bias_corrections(const Hyper& h, double age, Acc* step_size, Acc* root) {
  const bool correct = h.correct_bias != 0;
  *step_size = static_cast<Acc>(correct ? h.lr / (1 - std::pow(h.beta1, age)) : h.lr);
  *root = static_cast<Acc>(correct ? std::sqrt(1 - std::pow(h.beta2, age)) : 1.0);
}

template <typename Acc>
Acc* optional_pointer(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->mutable_data_ptr<Acc>() : nullptr;
}

template <typename T, typename Acc, typename Index>
void run_typed(const Index* indices, at::TensorList params, at::TensorList grads, const std::optional<at::Tensor>& compact,
               const at::Tensor& chunks, const at::Tensor& groups, const at::Tensor& hyper,
               const at::Tensor& steps, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
               const std::optional<at::Tensor>& max_exp_avg_sq, const std::optional<at::Tensor>& residual,
               const std::optional<at::Tensor>& master, const std::optional<at::Tensor>& cohorts, const std::optional<at::Tensor>& births, double multiplier, bool follow) {
  const int64_t tensors = params.size();
  TORCH_CHECK(!(residual && master), "master weights are kept as residual or as master, not as both");
  TORCH_CHECK(compact.has_value() || grads.size() == params.size(), "gradients must match their parameters");
  Job<T, Acc, Index> job;
  job.rows = chunk_rows(chunks);
  job.indices = indices;
  job.compact = optional_pointer<Acc>(compact);
  job.m = exp_avg.mutable_data_ptr<Acc>();
  job.v = exp_avg_sq.mutable_data_ptr<Acc>();
  job.v_max = optional_pointer<Acc>(max_exp_avg_sq);
  job.residual = optional_pointer<int16_t>(residual);
  job.master = optional_pointer<Acc>(master);
  job.follow = follow;
  job.cohorts = optional_pointer<uint8_t>(cohorts);
  job.params.assign(tensors, nullptr);
  job.grads.assign(tensors, nullptr);
  job.constants.resize(tensors);
  if (job.cohorts) {
    job.cohort_count = births->size(1);
    job.step_sizes.resize(tensors * job.cohort_count);
    job.roots.resize(tensors * job.cohort_count);
  }

  const auto* rows = reinterpret_cast<const Hyper*>(hyper.const_data_ptr<double>());
  const auto* group = groups.const_data_ptr<int32_t>();
  auto* step = steps.mutable_data_ptr<float>();
  for (int64_t t = 0; t < tensors; ++t) {
    if (!params[t].numel()) continue;
    TORCH_CHECK(params[t].is_contiguous() && params[t].is_cpu(), "parameters must be contiguous and on the CPU");
    job.params[t] = params[t].mutable_data_ptr<T>();
    if (!job.compact) {
      TORCH_CHECK(grads[t].is_contiguous() && grads[t].numel() == params[t].numel(), "gradients must match their parameters");
      job.grads[t] = grads[t].const_data_ptr<T>();
    }
    TORCH_CHECK(group[t] >= 0 && group[t] < hyper.size(0), "groups points outside hyper");
    const Hyper& h = rows[group[t]];
    step[t] += 1;
    Constants<Acc>& c = job.constants[t];
    c.decay = static_cast<Acc>(1 - h.lr * h.weight_decay);
    c.one_minus_beta1 = static_cast<Acc>(1 - h.beta1);
    c.beta2 = static_cast<Acc>(h.beta2);
    c.one_minus_beta2 = static_cast<Acc>(1 - h.beta2);
    c.eps = static_cast<Acc>(h.eps);
    c.sign = static_cast<Acc>(h.maximize != 0 ? -multiplier : multiplier);
    c.amsgrad = h.amsgrad != 0;
    bias_corrections(h, step[t], &c.step_size, &c.root);
    for (int64_t k = 0; k < job.cohort_count; ++k) {
      const double age = std::max(1.0f, step[t] - births->const_data_ptr<float>()[t * job.cohort_count + k]);
      bias_corrections(h, age, &job.step_sizes[t * job.cohort_count + k], &job.roots[t * job.cohort_count + k]);
    }
  }
  at::parallel_for(0, chunks.size(0), 1, [&](int64_t begin, int64_t end) { job.run(begin, end); });
}

void sparse_adamw_(at::TensorList params, at::TensorList grads, const std::optional<at::Tensor>& compact,
                   const at::Tensor& indices, const at::Tensor& chunks, const at::Tensor& groups, const at::Tensor& hyper,
                   at::Tensor steps, at::Tensor exp_avg, at::Tensor exp_avg_sq, std::optional<at::Tensor> max_exp_avg_sq,
                   std::optional<at::Tensor> residual, std::optional<at::Tensor> master,
                   const std::optional<at::Tensor>& cohorts, const std::optional<at::Tensor>& births,
                   const std::optional<at::Tensor>& multiplier, const std::optional<at::Tensor>& skip, int64_t, bool follow) {
  if (skip.has_value() && skip->item<double>() != 0) return;
  check_chunks(chunk_rows(chunks), chunks.size(0), 0, params.size(), exp_avg.numel(), indices.numel());
  const double scale = multiplier.has_value() ? multiplier->item<double>() : 1.0;
  at::ScalarType dtype = exp_avg.scalar_type();  // where every tensor is absent
  for (const at::Tensor& param : params) {
    if (param.numel()) dtype = param.scalar_type();
  }
  with_offsets(indices, [&](const auto* offsets) {
    const auto run = [&](auto weight, auto state) {
      run_typed<decltype(weight), decltype(state)>(offsets, params, grads, compact, chunks, groups, hyper, steps, exp_avg,
                                                   exp_avg_sq, max_exp_avg_sq, residual, master, cohorts, births, scale, follow);
    };
    switch (dtype) {
      case at::kFloat: return run(float(), float());
      case at::kBFloat16: return run(c10::BFloat16(), float());
      case at::kHalf: return run(c10::Half(), float());
      case at::kDouble: return run(double(), double());
      default: TORCH_CHECK(false, "parameters must be fp32, bf16, fp16 or fp64, got ", dtype);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(sparseopt, CPU, m) { m.impl("sparse_adamw_", &sparse_adamw_); }

}  // namespace sparseopt
