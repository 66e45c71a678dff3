// Walks a chunk table in tiles of at most kTile arena entries and moves values between tensors and tile buffers.
//
// A tile's loads are prefetched one tile ahead: the entries of a random mask lie on different cache lines, so without it
// every load waits for memory. kTile entries of two tensors (weights and gradients) stay within a 32 KiB L1 cache.
#pragma once

#include "common.h"

#include <algorithm>
#include <type_traits>

namespace sparseopt {

constexpr int64_t kTile = 128;
constexpr int64_t kLine = 64;  // bytes

struct Tile {
  int64_t chunk;   // row of the chunk table
  int64_t offset;  // first entry within the chunk
  int64_t count;   // entries
};

// The tiles of the rows [begin, end), in order.
class TileWalk {
 public:
  TileWalk(const Chunk* rows, int64_t begin, int64_t end) : rows_(rows), end_(end), next_{begin, 0, 0} { settle(); }
  bool done() const { return next_.chunk >= end_; }
  Tile take() {
    const Tile tile = next_;
    next_.offset += tile.count;
    settle();
    return tile;
  }

 private:
  void settle() {
    while (next_.chunk < end_ && next_.offset >= rows_[next_.chunk].count) {
      ++next_.chunk;
      next_.offset = 0;
    }
    if (next_.chunk < end_) next_.count = std::min(kTile, rows_[next_.chunk].count - next_.offset);
  }
  const Chunk* rows_;
  int64_t end_;
  Tile next_;
};

// Entries of a chunk are single (shift 0), whole runs of 8 to 64 (shift 3 to 6), or one contiguous stretch (longer): then
// a tile is one stretch too, and otherwise a whole number of runs, since kTile is a multiple of every run length.
SPARSEOPT_INLINE bool is_contiguous(const Chunk& chunk) { return chunk.shift > 6; }

// Calls move(flat element, position in the tile) for each run of kRun entries.
template <int64_t kRun, typename Index, typename Move>
SPARSEOPT_INLINE void for_each_run(const Chunk& chunk, const Tile& tile, const Index* indices, Move&& move) {
  const Index* offsets = indices + chunk.index_start + tile.offset / kRun;
  for (int64_t i = 0; i < tile.count; i += kRun) move(chunk.base + offsets[i / kRun], i);
}

// Calls move(flat element, position in the tile, integral_constant<length>) run by run; fixed lengths become plain moves.
template <typename Index, typename Move>
SPARSEOPT_INLINE void for_each_run(const Chunk& chunk, const Tile& tile, const Index* indices, Move&& move) {
  const auto with = [&](auto length) {
    for_each_run<length()>(chunk, tile, indices, [&](int64_t element, int64_t at) { move(element, at, length); });
  };
  switch (chunk.shift) {
    case 3: return with(std::integral_constant<int64_t, 8>());
    case 4: return with(std::integral_constant<int64_t, 16>());
    case 5: return with(std::integral_constant<int64_t, 32>());
    default: return with(std::integral_constant<int64_t, 64>());
  }
}

// The first element of a tile of a contiguous chunk.
template <typename Index>
SPARSEOPT_INLINE int64_t first_element(const Chunk& chunk, const Tile& tile, const Index* indices) {
  return chunk.base + indices[chunk.index_start] + tile.offset;
}

template <typename T, typename Index>
SPARSEOPT_INLINE void load_tile(const T* tensor, const Chunk& chunk, const Tile& tile, const Index* indices, T* out) {
  if (chunk.shift == 0) {
    const Index* offsets = indices + chunk.index_start + tile.offset;
    for (int64_t i = 0; i < tile.count; ++i) out[i] = tensor[chunk.base + offsets[i]];
  } else if (is_contiguous(chunk)) {
    std::memcpy(out, tensor + first_element(chunk, tile, indices), tile.count * sizeof(T));
  } else {
    for_each_run(chunk, tile, indices, [&](int64_t element, int64_t at, auto length) {
      std::memcpy(out + at, tensor + element, length() * sizeof(T));
    });
  }
}

template <typename T, typename Index>
SPARSEOPT_INLINE void store_tile(T* tensor, const Chunk& chunk, const Tile& tile, const Index* indices, const T* in) {
  if (chunk.shift == 0) {
    const Index* offsets = indices + chunk.index_start + tile.offset;
    for (int64_t i = 0; i < tile.count; ++i) tensor[chunk.base + offsets[i]] = in[i];
  } else if (is_contiguous(chunk)) {
    std::memcpy(tensor + first_element(chunk, tile, indices), in, tile.count * sizeof(T));
  } else {
    for_each_run(chunk, tile, indices, [&](int64_t element, int64_t at, auto length) {
      std::memcpy(tensor + element, in + at, length() * sizeof(T));
    });
  }
}

// The hardware follows contiguous stretches by itself.
template <typename T, typename Index>
SPARSEOPT_INLINE void prefetch_tile(const T* tensor, const Chunk& chunk, const Tile& tile, const Index* indices) {
  if (tensor == nullptr || is_contiguous(chunk)) return;
  if (chunk.shift == 0) {
    const Index* offsets = indices + chunk.index_start + tile.offset;
    for (int64_t i = 0; i < tile.count; ++i) __builtin_prefetch(tensor + (chunk.base + offsets[i]));
  } else {
    for_each_run(chunk, tile, indices, [&](int64_t element, int64_t, auto length) {
      const char* first = reinterpret_cast<const char*>(tensor + element);
      for (int64_t byte = 0; byte < static_cast<int64_t>(length() * sizeof(T)); byte += kLine) __builtin_prefetch(first + byte);
    });
  }
}

// Calls run(pointer to the offsets) with their type.
template <typename Run>
void with_offsets(const at::Tensor& indices, Run&& run) {
  switch (indices.scalar_type()) {
    case at::kShort: return run(indices.const_data_ptr<int16_t>());
    case at::kInt: return run(indices.const_data_ptr<int32_t>());
    default: TORCH_CHECK(false, "indices must be int16 or int32, got ", indices.scalar_type());
  }
}

}  // namespace sparseopt
