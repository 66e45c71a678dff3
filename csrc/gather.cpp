// gather_grads_: compact[entry] (+)= grad[position of the entry], all tensors in one call.
//
//   compact: fp32[N] (fp64[N] for fp64 gradients); grads: T tensors of one dtype, an empty one is left out.
//
// Threads take consecutive chunks; loads are prefetched one tile ahead. Each entry is written by one thread: deterministic.
#include "tiles.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <vector>

namespace sparseopt {
namespace {

template <typename T, typename Acc>
void gather(const std::vector<const T*>& grads, const Chunk* rows, int64_t count, const int32_t* indices, int64_t first,
            bool accumulate, Acc* compact) {
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
    }
  });
}

template <typename T, typename Acc>
void gather_typed(const at::Tensor& compact, at::TensorList grads, const Chunk* rows, int64_t count,
                  const int32_t* indices, int64_t first, bool accumulate) {
  TORCH_CHECK(compact.scalar_type() == c10::CppTypeToScalarType<Acc>::value, "compact has the wrong dtype for these gradients");
  std::vector<const T*> pointers;
  for (const at::Tensor& grad : grads) pointers.push_back(grad.numel() ? grad.const_data_ptr<T>() : nullptr);
  gather<T, Acc>(pointers, rows, count, indices, first, accumulate, compact.mutable_data_ptr<Acc>());
}

void gather_grads_(at::Tensor compact, at::TensorList grads, const at::Tensor& indices, const at::Tensor& chunks,
                   int64_t first, bool accumulate) {
  const Chunk* rows = chunk_rows(chunks);
  const int64_t count = chunks.size(0);
  check_chunks(rows, count, first, grads.size(), compact.numel(), indices.numel());
  at::ScalarType dtype = compact.scalar_type();  // where every gradient is absent
  for (const at::Tensor& grad : grads) {
    if (!grad.numel()) continue;
    TORCH_CHECK(grad.is_cpu() && grad.is_contiguous(), "gradients must be contiguous and on the CPU");
    dtype = grad.scalar_type();
  }
  const int32_t* offsets = indices.const_data_ptr<int32_t>();
  switch (dtype) {
    case at::kFloat: return gather_typed<float, float>(compact, grads, rows, count, offsets, first, accumulate);
    case at::kBFloat16: return gather_typed<c10::BFloat16, float>(compact, grads, rows, count, offsets, first, accumulate);
    case at::kHalf: return gather_typed<c10::Half, float>(compact, grads, rows, count, offsets, first, accumulate);
    case at::kDouble: return gather_typed<double, double>(compact, grads, rows, count, offsets, first, accumulate);
    default: TORCH_CHECK(false, "gradients must be fp32, bf16, fp16 or fp64, got ", dtype);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(sparseopt, CPU, m) { m.impl("gather_grads_", &gather_grads_); }

}  // namespace sparseopt
