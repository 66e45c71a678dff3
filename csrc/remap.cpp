// remap_entries_: target[new place of an entry] = source[its old place], for every entry that both plans have.
//
//   targets, sources: K pairs of vectors of one dtype each, [N] in the new arena order and [M] in the old one; entries that
//   the old plan lacks keep what their target holds.
//
// Both plans are sorted: a row of the new chunk table meets a few rows of the old one, found by bisecting the old table.
// Where entries are dense, the old ones note their places in a table of the elements between the row's first and last;
// else both rows are walked along together. O(N + M) reads of the indices, no mask, whatever the number of pairs. Threads
// take consecutive rows. Values are moved as bits. Each entry has one writer: deterministic.
#include "tiles.h"

#include <torch/library.h>

#include <algorithm>
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
  // Without a branch: which entries survive is as good as random.
  for (int64_t k = 0; k < count; ++k) {
    const Bits value = source[places[k] < 0 ? 0 : places[k]];
    target[k] = places[k] < 0 ? target[k] : value;
  }
}

// Finds the places of a new row's entries among the old rows; one for each thread.
template <typename Old>
class Finder {
 public:
  Finder(const Chunk* rows, int64_t count, const Old* indices)
      : rows_(rows), count_(count), indices_(indices), theirs_(kMostEntries + 1), table_(kMostSpan) {}

  // places[k] of the sorted elements mine[0 .. row.count), -1 for what the old plan lacks.
  void find(const Chunk& row, const int64_t* mine, int64_t* places) {
    const int64_t first = mine[0], span = mine[row.count - 1] - first + 1;
    int64_t r = row_at(row.tensor, first);
    if (span <= kMostSpan && span <= kDense * row.count) {
      // Where entries are close together: by a table of the elements in between. No step waits for the one before.
      std::fill_n(table_.begin(), span, int32_t{-1});
      const int64_t start = rows_[r].start;
      for (; r < count_ && rows_[r].tensor == row.tensor && first_of(rows_[r]) < first + span; ++r) {
        const Chunk& old = rows_[r];
        load(r);
        const int64_t begin = std::lower_bound(theirs_.begin(), theirs_.begin() + old.count, first) - theirs_.begin();
        const int64_t end =
            std::lower_bound(theirs_.begin() + begin, theirs_.begin() + old.count, first + span) - theirs_.begin();
        const auto base = static_cast<int32_t>(old.start - start);
        for (int64_t k = begin; k < end; ++k) table_[theirs_[k] - first] = base + static_cast<int32_t>(k);
      }
      for (int64_t k = 0; k < row.count; ++k) {
        const int32_t at = table_[mine[k] - first];
        places[k] = at < 0 ? -1 : start + at;
      }
      return;
    }
    int64_t k = 0;
    for (; k < row.count && r < count_ && rows_[r].tensor == row.tensor; ++r) {
      const Chunk& old = rows_[r];
      load(r);
      int64_t at = std::lower_bound(theirs_.begin(), theirs_.begin() + old.count, mine[k]) - theirs_.begin();
      theirs_[old.count] = INT64_MAX;
      const int64_t last = theirs_[old.count - 1];
      while (k < row.count && mine[k] <= last) {
        const int64_t wanted = mine[k], here = theirs_[at];
        places[k] = here == wanted ? old.start + at : -1;
        at += here <= wanted;
        k += here >= wanted;
      }
    }
    for (; k < row.count; ++k) places[k] = -1;
  }

 private:
  static constexpr int64_t kMostSpan = int64_t{1} << 16, kDense = 32;

  int64_t first_of(const Chunk& old) const { return old.base + indices_[old.index_start]; }

  // The last row of a tensor that begins at or before an element, else its first row, else one of another tensor.
  int64_t row_at(int64_t tensor, int64_t element) const {
    int64_t low = 0, high = count_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      const Chunk& old = rows_[middle];
      if (old.tensor != tensor ? old.tensor < tensor : first_of(old) <= element) low = middle + 1;
      else high = middle;
    }
    if (low > 0 && rows_[low - 1].tensor == tensor) return low - 1;
    return std::min(low, count_ - 1);
  }

  void load(int64_t r) {
    if (r == loaded_) return;
    elements_of(rows_[r], indices_, theirs_.data());
    loaded_ = r;
  }

  const Chunk* rows_;
  int64_t count_;
  const Old* indices_;
  std::vector<int64_t> theirs_;  // elements of the row `loaded_`, and a sentinel
  std::vector<int32_t> table_;
  int64_t loaded_ = -1;
};

template <typename New, typename Old>
void remap(const std::vector<Pair>& pairs, const Chunk* rows, int64_t count, const New* indices, const Chunk* old_rows,
           int64_t old_count, const Old* old_indices) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> mine(kMostEntries), places(kMostEntries);
    Finder<Old> finder(old_rows, old_count, old_indices);
    for (int64_t c = begin; c < end; ++c) {
      const Chunk& row = rows[c];
      elements_of(row, indices, mine.data());
      finder.find(row, mine.data(), places.data());
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
  if (pairs.empty() || old_count == 0) return;
  with_offsets(indices, [&](const auto* offsets) {
    with_offsets(old_indices, [&](const auto* old_offsets) {
      remap(pairs, rows, count, offsets, old_rows, old_count, old_offsets);
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(sparseopt, CPU, m) { m.impl("remap_entries_", &remap_entries_); }

}  // namespace sparseopt
