// remap_entries_: target[new place of an entry] = source[its old place], for every entry that both plans have.
//
//   targets, sources: K pairs of vectors of one dtype each, [N] in the new arena order and [M] in the old one; entries that
//   the old plan lacks keep what their target holds.
//
// Both plans are sorted, so that one walk along both finds every entry: no search, no mask, O(N + M) reads of the indices
// whatever the number of pairs. Threads take consecutive rows of the new chunk table; a row begins its walk at the old row
// that holds its first element. Values are moved as bits. Each entry has one writer: deterministic.
#include "tiles.h"

#include <torch/library.h>

#include <vector>

namespace sparseopt {
namespace {

constexpr int64_t kMostEntries = 4096;  // of a row

// Flat elements of a row's entries.
template <typename Index>
void elements_of(const Chunk& chunk, const Index* indices, int64_t* out) {
  const Index* offsets = indices + chunk.index_start;
  if (chunk.shift == 0) {
    for (int64_t k = 0; k < chunk.count; ++k) out[k] = chunk.base + offsets[k];
    return;
  }
  const int64_t length = int64_t{1} << chunk.shift;
  for (int64_t k = 0; k < chunk.count; ++k) out[k] = chunk.base + offsets[k >> chunk.shift] + (k & (length - 1));
}

struct Pair {
  char* target;
  const char* source;
  int64_t size;  // bytes of a value
};

template <typename Bits>
void move(const Pair& pair, int64_t start, int64_t count, const int64_t* places) {
  Bits* target = reinterpret_cast<Bits*>(pair.target) + start;
  const Bits* source = reinterpret_cast<const Bits*>(pair.source);
  for (int64_t k = 0; k < count; ++k) {
    if (places[k] >= 0) target[k] = source[places[k]];
  }
}

template <typename New, typename Old>
void remap(const std::vector<Pair>& pairs, const Chunk* rows, int64_t count, const New* indices, const Chunk* old_rows,
           int64_t old_count, const Old* old_indices) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    // One more than fits: a sentinel past the last element.
    std::vector<int64_t> mine(kMostEntries), theirs(kMostEntries + 1), places(kMostEntries);
    int64_t old_row = -1;  // whose elements `theirs` holds
    int64_t at = 0;
    const auto before = [&](const Chunk& old, const Chunk& row, int64_t element) {
      if (old.tensor != row.tensor) return old.tensor < row.tensor;
      return old.base + old_indices[old.index_start] <= element;
    };
    for (int64_t c = begin; c < end; ++c) {
      const Chunk& row = rows[c];
      elements_of(row, indices, mine.data());
      // The last old row that begins at or before this row's first element.
      int64_t low = 0, high = old_count;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (before(old_rows[middle], row, mine[0])) low = middle + 1;
        else high = middle;
      }
      int64_t r = std::max<int64_t>(low - 1, 0);
      int64_t k = 0;
      for (; k < row.count && r < old_count && old_rows[r].tensor <= row.tensor; ++r) {
        const Chunk& old = old_rows[r];
        if (old.tensor != row.tensor) continue;
        if (r != old_row) {
          elements_of(old, old_indices, theirs.data());
          theirs[old.count] = INT64_MAX;
          old_row = r, at = 0;
        }
        // `at` may stand past this row's first element after the row before; never behind it for long.
        while (at > 0 && theirs[at - 1] >= mine[k]) --at;
        const int64_t last = theirs[old.count - 1];
        while (k < row.count && mine[k] <= last) {
          const int64_t wanted = mine[k], here = theirs[at];
          places[k] = here == wanted ? old.start + at : -1;
          at += here <= wanted;
          k += here >= wanted;
        }
      }
      for (; k < row.count; ++k) places[k] = -1;
      for (const Pair& pair : pairs) {
        switch (pair.size) {
          case 1: move<uint8_t>(pair, row.start, row.count, places.data()); break;
          case 2: move<uint16_t>(pair, row.start, row.count, places.data()); break;
          case 4: move<uint32_t>(pair, row.start, row.count, places.data()); break;
          default: move<uint64_t>(pair, row.start, row.count, places.data());
        }
      }
    }
  });
}

void remap_entries_(at::TensorList targets, at::TensorList sources, const at::Tensor& indices, const at::Tensor& chunks,
                    const at::Tensor& old_indices, const at::Tensor& old_chunks) {
  const Chunk *rows = chunk_rows(chunks), *old_rows = chunk_rows(old_chunks);
  const int64_t count = chunks.size(0), old_count = old_chunks.size(0);
  TORCH_CHECK(targets.size() == sources.size(), "expected as many sources as targets, ", targets.size(), ", got ",
              sources.size());
  std::vector<Pair> pairs;
  for (size_t i = 0; i < targets.size(); ++i) {
    const at::Tensor &target = targets[i], &source = sources[i];
    TORCH_CHECK(target.is_cpu() && source.is_cpu() && target.is_contiguous() && source.is_contiguous() &&
                    target.dim() == 1 && source.dim() == 1,
                "targets and sources must be contiguous vectors on the CPU");
    TORCH_CHECK(target.scalar_type() == source.scalar_type() && target.element_size() <= 8,
                "a source must have its target's dtype, ", target.scalar_type(), ", got ", source.scalar_type());
    check_chunks(rows, count, 0, INT64_MAX, target.numel(), indices.numel());
    check_chunks(old_rows, old_count, 0, INT64_MAX, source.numel(), old_indices.numel());
    pairs.push_back({static_cast<char*>(target.mutable_data_ptr()), static_cast<const char*>(source.const_data_ptr()),
                     static_cast<int64_t>(target.element_size())});
  }
  for (int64_t c = 0; c < count + old_count; ++c) {
    const int64_t entries = (c < count ? rows[c] : old_rows[c - count]).count;
    TORCH_CHECK(entries >= 1 && entries <= kMostEntries, "a chunk has ", entries, " entries, expected 1 to ", kMostEntries);
  }
  if (pairs.empty()) return;
  with_offsets(indices, [&](const auto* offsets) {
    with_offsets(old_indices, [&](const auto* old_offsets) {
      remap(pairs, rows, count, offsets, old_rows, old_count, old_offsets);
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(sparseopt, CPU, m) { m.impl("remap_entries_", &remap_entries_); }

}  // namespace sparseopt
