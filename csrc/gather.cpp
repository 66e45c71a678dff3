// gather_grads_: compact[entry] (+)= grad[position of the entry], all tensors in one call.
// clip_coefficient_: from its sums of squares to the norm and what the gradients are multiplied by.
//
//   compact: fp32[N] (fp64[N] for fp64 gradients); grads: T tensors of one dtype, an empty one is left out;
//   squares: like compact, equally many for each row of the chunk table, which add up to the sum of squares of what compact
//   then holds there (here the first has it all).
//
// Threads take consecutive chunks; loads are prefetched one tile ahead. Each entry is written by one thread: deterministic.
#include "tiles.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <vector>

namespace sparseopt {
namespace {

template <typename T, typename Acc, typename Index>
void gather(const std::vector<const T*>& grads, const Chunk* rows, int64_t count, const Index* indices, int64_t first,
            bool accumulate, Acc* compact, Acc* squares, int64_t per_row) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    TileWalk walk(rows, begin, end), ahead(rows, begin, end);
    const auto prefetch = [&] {
      if (ahead.done()) return;
      const Tile next = ahead.take();
      prefetch_tile(grads[rows[next.chunk].tensor - first], rows[next.chunk], next, indices);
    };
    prefetch();
    T values[kTile];
    while (!walk.done()) {
      prefetch();
      const Tile tile = walk.take();
      const Chunk& chunk = rows[tile.chunk];
      const T* grad = grads[chunk.tensor - first];
      if (grad == nullptr) continue;
      load_tile(grad, chunk, tile, indices, values);
      Acc* out = compact + chunk.start + tile.offset;
      if (accumulate) {
        for (int64_t i = 0; i < tile.count; ++i) out[i] += static_cast<Acc>(values[i]);
      } else {
        for (int64_t i = 0; i < tile.count; ++i) out[i] = static_cast<Acc>(values[i]);
      }
      if (squares != nullptr) {
        Acc sum = 0;
        for (int64_t i = 0; i < tile.count; ++i) sum += out[i] * out[i];
        Acc* sums = squares + tile.chunk * per_row;
        if (tile.offset == 0) std::fill_n(sums, per_row, Acc{0});
        *sums += sum;
      }
    }
  });
}

template <typename T, typename Acc>
void gather_typed(const at::Tensor& compact, at::TensorList grads, const Chunk* rows, int64_t count,
                  const at::Tensor& indices, int64_t first, bool accumulate, const std::optional<at::Tensor>& squares) {
  TORCH_CHECK(compact.scalar_type() == c10::CppTypeToScalarType<Acc>::value, "compact has the wrong dtype for these gradients");
  std::vector<const T*> pointers;
  for (const at::Tensor& grad : grads) pointers.push_back(grad.numel() ? grad.const_data_ptr<T>() : nullptr);
  const int64_t per_row = squares && count ? squares->numel() / count : 0;
  TORCH_CHECK(!squares || squares->numel() == count * per_row, "squares must have equally many numbers for each row of chunks");
  Acc* sums = squares ? squares->mutable_data_ptr<Acc>() : nullptr;
  with_offsets(indices, [&](const auto* offsets) {
    gather<T, Acc>(pointers, rows, count, offsets, first, accumulate, compact.mutable_data_ptr<Acc>(), sums, per_row);
  });
}

void gather_grads_(at::Tensor compact, at::TensorList grads, const at::Tensor& indices, const at::Tensor& chunks,
                   int64_t first, bool accumulate, int64_t, std::optional<at::Tensor> squares) {
  const Chunk* rows = chunk_rows(chunks);
  const int64_t count = chunks.size(0);
  check_chunks(rows, count, first, grads.size(), compact.numel(), indices.numel());
  at::ScalarType dtype = compact.scalar_type();  // where every gradient is absent
  for (const at::Tensor& grad : grads) {
    if (!grad.numel()) continue;
    TORCH_CHECK(grad.is_cpu() && grad.is_contiguous(), "gradients must be contiguous and on the CPU");
    dtype = grad.scalar_type();
  }
  switch (dtype) {
    case at::kFloat: return gather_typed<float, float>(compact, grads, rows, count, indices, first, accumulate, squares);
    case at::kBFloat16: return gather_typed<c10::BFloat16, float>(compact, grads, rows, count, indices, first, accumulate, squares);
    case at::kHalf: return gather_typed<c10::Half, float>(compact, grads, rows, count, indices, first, accumulate, squares);
    case at::kDouble: return gather_typed<double, double>(compact, grads, rows, count, indices, first, accumulate, squares);
    default: TORCH_CHECK(false, "gradients must be fp32, bf16, fp16 or fp64, got ", dtype);
  }
}

double number(const std::optional<at::Tensor>& tensor, double otherwise) {
  return tensor.has_value() ? tensor->item<double>() : otherwise;
}

void clip_coefficient_(const at::Tensor& squares, double max_norm, const std::optional<at::Tensor>& inverse_scale,
                       const std::optional<at::Tensor>& found_inf, at::Tensor norm, at::Tensor multiplier, at::Tensor skip) {
  double sum = 0;
  const auto add = [&](const auto* values) {
    for (int64_t i = 0; i < squares.numel(); ++i) sum += values[i];
  };
  if (squares.scalar_type() == at::kDouble) {
    add(squares.const_data_ptr<double>());
  } else {
    add(squares.const_data_ptr<float>());
  }
  const double scale = number(inverse_scale, 1.0);
  const auto total = static_cast<float>(std::sqrt(sum) * scale);
  *norm.mutable_data_ptr<float>() = total;
  const double coefficient = max_norm / (static_cast<double>(total) + 1e-6);
  *multiplier.mutable_data_ptr<float>() = static_cast<float>((coefficient > 1 ? 1 : coefficient) * scale);
  *skip.mutable_data_ptr<float>() = !std::isfinite(total) || number(found_inf, 0.0) != 0;
}

}  // namespace

TORCH_LIBRARY_IMPL(sparseopt, CPU, m) {
  m.impl("gather_grads_", &gather_grads_);
  m.impl("clip_coefficient_", &clip_coefficient_);
}

}  // namespace sparseopt
