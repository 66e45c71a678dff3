// scatter_values_: param[position of the entry] = values[entry], all tensors in one call; the inverse of gather_grads_.
//
//   params: T contiguous tensors of one dtype (fp32, bf16, fp16, fp64), an empty one is left out; values: [N] of that dtype,
//   arena order.
//
// Values are moved as bits (NaN payloads and -0 included), so that the type is an integer of the same size. Threads take
// consecutive chunks; the lines that will be written are prefetched one tile ahead. Each entry is written by one thread:
// deterministic as long as no two tensors overlap.
#include "tiles.h"

#include <torch/library.h>

#include <vector>

namespace sparseopt {
namespace {

template <typename Bits, typename Index>
void scatter(const std::vector<Bits*>& params, const Chunk* rows, int64_t count, const Index* indices, const Bits* values) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    TileWalk walk(rows, begin, end), ahead(rows, begin, end);
    const auto prefetch = [&] {
      if (ahead.done()) return;
      const Tile next = ahead.take();
      prefetch_tile(params[rows[next.chunk].tensor], rows[next.chunk], next, indices);
    };
    prefetch();
    while (!walk.done()) {
      prefetch();
      const Tile tile = walk.take();
      const Chunk& chunk = rows[tile.chunk];
      Bits* param = params[chunk.tensor];
      if (param != nullptr) store_tile(param, chunk, tile, indices, values + chunk.start + tile.offset);
    }
  });
}

void scatter_values_(at::TensorList params, const at::Tensor& values, const at::Tensor& indices, const at::Tensor& chunks,
                     int64_t) {
  const Chunk* rows = chunk_rows(chunks);
  const int64_t count = chunks.size(0);
  TORCH_CHECK(values.is_cpu() && values.is_contiguous(), "values must be contiguous and on the CPU");
  check_chunks(rows, count, 0, params.size(), values.numel(), indices.numel());
  for (const at::Tensor& param : params) {
    if (!param.numel()) continue;
    TORCH_CHECK(param.is_cpu() && param.is_contiguous(), "parameters must be contiguous and on the CPU");
    TORCH_CHECK(param.scalar_type() == values.scalar_type(), "values must have the parameters' dtype, ", param.scalar_type(),
                ", got ", values.scalar_type());
  }
  const auto run = [&](auto bits) {
    using Bits = decltype(bits);
    std::vector<Bits*> pointers;
    for (const at::Tensor& param : params) {
      pointers.push_back(param.numel() ? static_cast<Bits*>(param.mutable_data_ptr()) : nullptr);
    }
    with_offsets(indices, [&](const auto* offsets) {
      scatter(pointers, rows, count, offsets, static_cast<const Bits*>(values.const_data_ptr()));
    });
  };
  switch (values.scalar_type()) {
    case at::kFloat: return run(uint32_t());
    case at::kBFloat16:
    case at::kHalf: return run(uint16_t());
    case at::kDouble: return run(uint64_t());
    default: TORCH_CHECK(false, "values must be fp32, bf16, fp16 or fp64, got ", values.scalar_type());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(sparseopt, CPU, m) { m.impl("scatter_values_", &scatter_values_); }

}  // namespace sparseopt
