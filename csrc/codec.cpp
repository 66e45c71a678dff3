// Mask codec: gaps or runs of a packed mask, Rice-coded in blocks. The same format in numpy: sparseopt/masks/_rice.py.
//
//   stream = flags (1 byte: 1 runs, 2 inverted) | varint unit | varint count | blocks of 1024 symbols, the last shorter
//   block  = one part (gaps: inactive units before each active one) or two (runs: inactive units before each run of active
//            ones; lengths of those runs minus one); inverted: active and inactive change places
//   part   = k (1 byte) | varint bytes of "high" | low: k bits of each value | high: value >> k, unary | escapes: varints
//
// `unit` is the largest group size such that all aligned groups are uniform (a row of a mask of whole rows), so structured
// masks cost as much as a random mask of their groups. `k` is the cheapest for its 1024 values: density may change along a
// tensor. Unary numbers are zeros ended by a one and stop at 16; the rest of a larger one is an escape, so that a jump over
// empty rows does not raise k for its neighbours. Low bits and unary numbers lie apart: whole words of either are read at
// once, and numpy can decode them without a loop. All is little bit order; each of low and high begins at a byte.
//
// Decoding flips bits of its target, so that a difference is applied in place. Streams are not trusted: every read and
// every position is checked, and values are bounded before they are shifted or added.
#include "codec.h"

#include "common.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

namespace sparseopt {
namespace {

constexpr size_t kBlock = 1024;
constexpr uint64_t kEscape = 16;
constexpr int kMaxShift = kMaxBits;
constexpr uint8_t kRuns = 1, kInverted = 2;

// ---- bits ------------------------------------------------------------------------------------------------------------
SPARSEOPT_INLINE uint64_t load_word(const uint8_t* bytes, size_t available) {
  uint64_t word = 0;
  std::memcpy(&word, bytes, available < 8 ? available : 8);
  return word;
}

// Flips entries [begin, end) of a packed mask.
SPARSEOPT_INLINE void flip_range(uint8_t* bits, uint64_t begin, uint64_t end) {
  if (begin >= end) return;
  const uint64_t first = begin >> 3, last = end >> 3;
  const auto head = static_cast<uint8_t>(0xff << (begin & 7)), tail = static_cast<uint8_t>((1 << (end & 7)) - 1);
  if (first == last) {
    bits[first] ^= head & tail;
    return;
  }
  bits[first] ^= head;
  for (uint64_t i = first + 1; i < last; ++i) bits[i] ^= 0xff;
  if (tail) bits[last] ^= tail;
}

// First entry at or after `from` that is `value`; n if there is none.
SPARSEOPT_INLINE uint64_t find_bit(const uint8_t* bits, uint64_t n, uint64_t from, bool value) {
  const uint64_t size = (n + 7) / 8, flip = value ? 0 : ~uint64_t{0};
  uint64_t byte = from >> 3;
  if (byte >= size) return n;
  uint64_t word = (load_word(bits + byte, size - byte) ^ flip) & (~uint64_t{0} << (from & 7));
  while (!word) {
    byte += 8;
    if (byte >= size) return n;
    word = load_word(bits + byte, size - byte) ^ flip;
  }
  return std::min(n, 8 * byte + static_cast<uint64_t>(__builtin_ctzll(word)));
}

// ---- decoding --------------------------------------------------------------------------------------------------------
struct Damaged {
  const char* what;
};

[[noreturn]] void damaged(const char* what) { throw Damaged{what}; }

struct Reader {
  const uint8_t* at;
  const uint8_t* end;

  size_t left() const { return static_cast<size_t>(end - at); }

  uint8_t byte() {
    if (at == end) damaged("the stream ends too early");
    return *at++;
  }

  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 63; shift += 7) {
      const uint8_t next = byte();
      value |= static_cast<uint64_t>(next & 127) << shift;
      if (next < 128) return value;
    }
    damaged("a number is too long");
  }

  const uint8_t* take(uint64_t size) {
    if (size > left()) damaged("the stream ends too early");
    const uint8_t* taken = at;
    at += size;
    return taken;
  }
};

// One part of `count` values, none above `limit`.
SPARSEOPT_INLINE void read_part(Reader& reader, size_t count, uint64_t limit, uint64_t* values) {
  const int k = reader.byte();
  if (k > kMaxShift) damaged("a shift is too large");
  const uint64_t high_size = reader.varint();
  if (high_size > (count * (kEscape + 1) + 7) / 8) damaged("a unary number is too long");
  const uint8_t* low = reader.take((count * k + 7) / 8);
  const uint8_t* high = reader.take(high_size);

  size_t found = 0;
  uint64_t next = 0, largest = 0;
  for (uint64_t i = 0; i < high_size; i += 8) {
    for (uint64_t word = load_word(high + i, high_size - i); word; word &= word - 1) {
      if (found == count) damaged("a block has too many values");
      const uint64_t position = 8 * i + static_cast<uint64_t>(__builtin_ctzll(word));
      largest = std::max(largest, position - next);
      values[found++] = position - next;
      next = position + 1;
    }
  }
  if (found != count) damaged("a block has too few values");
  if (largest >= kEscape) {
    for (size_t i = 0; i < count; ++i) {
      if (values[i] > kEscape) damaged("a unary number is too long");
      if (values[i] == kEscape) {
        values[i] += reader.varint();
        largest = std::max(largest, values[i]);
      }
    }
  }
  if (largest > limit >> k) damaged("a value is too large");
  if (k == 0) return;

  const uint64_t mask = (uint64_t{1} << k) - 1;
  const auto readable = static_cast<size_t>(reader.end - low);  // k + 7 bits lie in 8 bytes
  for (size_t i = 0; i < count; ++i) {
    const size_t bit = i * k, at = bit >> 3;
    uint64_t word;
    if (__builtin_expect(at + 8 <= readable, 1)) {
      std::memcpy(&word, low + at, 8);
    } else {
      word = load_word(low + at, readable - at);
    }
    values[i] = values[i] << k | (word >> (bit & 7) & mask);
  }
}

SPARSEOPT_INLINE void decode_stream(const uint8_t* stream, size_t size, uint8_t* bits, uint64_t n) {
  Reader reader{stream, stream + size};
  const uint8_t flags = reader.byte();
  if (flags > (kRuns | kInverted)) damaged("the kind of coding is unknown");
  const uint64_t unit = reader.varint(), count = reader.varint();
  if (unit == 0 || unit > std::max<uint64_t>(n, 1)) damaged("the size of the groups does not fit");
  const uint64_t units = (n + unit - 1) / unit;
  if (count > units) damaged("there are more values than entries");
  if (flags & kInverted) flip_range(bits, 0, n);

  uint64_t values[kBlock], lengths[kBlock];
  uint64_t position = 0;  // in units
  for (uint64_t done = 0; done < count;) {
    const auto block = static_cast<size_t>(std::min<uint64_t>(kBlock, count - done));
    read_part(reader, block, units, values);
    if (flags & kRuns) {
      read_part(reader, block, units, lengths);
      for (size_t i = 0; i < block; ++i) {
        const uint64_t begin = position + values[i], end = begin + lengths[i] + 1;
        if (end > units) damaged("a run lies outside of the mask");
        flip_range(bits, begin * unit, std::min(end * unit, n));
        position = end;
      }
    } else if (unit == 1) {
      for (size_t i = 0; i < block; ++i) {
        position += values[i];
        if (position >= n) damaged("an entry lies outside of the mask");
        bits[position >> 3] ^= static_cast<uint8_t>(1 << (position & 7));
        ++position;
      }
    } else {
      for (size_t i = 0; i < block; ++i) {
        position += values[i];
        if (position >= units) damaged("an entry lies outside of the mask");
        flip_range(bits, position * unit, std::min((position + 1) * unit, n));
        ++position;
      }
    }
    done += block;
  }
  if (reader.left()) damaged("something follows the last block");
}

// The compiler takes its clones for functions that never throw: nothing leaves this one.
SPARSEOPT_CLONES const char* decode_checked(const uint8_t* stream, size_t size, uint8_t* bits, uint64_t n) noexcept {
  try {
    decode_stream(stream, size, bits, n);
  } catch (const Damaged& found) {
    return found.what;
  }
  return nullptr;
}

// ---- encoding --------------------------------------------------------------------------------------------------------
SPARSEOPT_INLINE int varint_bits(uint64_t value) { return 8 * ((std::bit_width(value | 1) + 6) / 7); }

class Writer {
 public:
  Writer(uint8_t flags, uint64_t unit, uint64_t count, size_t limit) : limit_(limit) {
    bytes_.push_back(static_cast<char>(flags));
    varint(unit);
    varint(count);
  }

  bool too_long() const { return bytes_.size() >= limit_; }
  std::string take() { return std::move(bytes_); }

  void part(const std::vector<uint64_t>& values) {
    const int k = cheapest(values);
    uint64_t high_bits = 0;
    for (const uint64_t value : values) high_bits += std::min(value >> k, kEscape) + 1;
    bytes_.push_back(static_cast<char>(k));
    varint((high_bits + 7) / 8);
    const size_t low = bytes_.size(), high = low + (values.size() * k + 7) / 8;
    bytes_.resize(high + (high_bits + 7) / 8, '\0');
    size_t bit = 8 * low;
    for (const uint64_t value : values) {
      for (int left = k; left > 0;) {  // a byte at a time
        const int step = std::min<int>(left, 8 - static_cast<int>(bit & 7));
        bytes_[bit >> 3] |= static_cast<char>((value >> (k - left) & ((1u << step) - 1)) << (bit & 7));
        bit += step;
        left -= step;
      }
    }
    bit = 8 * high;
    for (const uint64_t value : values) {
      bit += std::min(value >> k, kEscape);
      bytes_[bit >> 3] |= static_cast<char>(1 << (bit & 7));
      ++bit;
    }
    for (const uint64_t value : values) {
      if (value >> k >= kEscape) varint((value >> k) - kEscape);
    }
  }

 private:
  void varint(uint64_t value) {
    for (; value > 127; value >>= 7) bytes_.push_back(static_cast<char>(value | 128));
    bytes_.push_back(static_cast<char>(value));
  }

  // The smallest of the cheapest shifts; past the width of the mean every value only grows.
  static int cheapest(const std::vector<uint64_t>& values) {
    const uint64_t sum = std::accumulate(values.begin(), values.end(), uint64_t{0});
    const int last = std::min(static_cast<int>(std::bit_width(sum / values.size())), kMaxShift);
    int best = 0;
    uint64_t best_cost = ~uint64_t{0};
    for (int k = 0; k <= last; ++k) {
      uint64_t cost = values.size() * k;
      for (const uint64_t value : values) {
        const uint64_t high = value >> k;
        cost += high < kEscape ? high : kEscape + varint_bits(high - kEscape);
      }
      if (cost < best_cost) best = k, best_cost = cost;
    }
    return best;
  }

  std::string bytes_;
  size_t limit_;
};

struct Structure {
  uint64_t unit = 0, runs = 0, active = 0;  // active entries
};

SPARSEOPT_CLONES Structure structure_of(const uint8_t* bits, uint64_t n) noexcept {
  Structure found;
  for (uint64_t begin = find_bit(bits, n, 0, true); begin < n;) {
    const uint64_t end = find_bit(bits, n, begin, false);
    if (found.unit != 1) {
      // A change at entry 0 or n says nothing about the groups.
      if (begin && (!found.unit || begin % found.unit)) found.unit = std::gcd(found.unit, begin);
      if (end < n && (!found.unit || end % found.unit)) found.unit = std::gcd(found.unit, end);
    }
    ++found.runs;
    found.active += end - begin;
    begin = find_bit(bits, n, end, true);
  }
  if (!found.unit) found.unit = std::max<uint64_t>(n, 1);
  return found;
}

// Calls each(begin, end), in units, for every run of `value`.
template <typename Each>
SPARSEOPT_INLINE void for_runs(const uint8_t* bits, uint64_t n, uint64_t unit, bool value, Each each) {
  for (uint64_t begin = find_bit(bits, n, 0, value); begin < n;) {
    const uint64_t end = find_bit(bits, n, begin, !value);
    if (!each(begin / unit, (end + unit - 1) / unit)) return;
    begin = find_bit(bits, n, end, value);
  }
}

std::string encode_gaps(const uint8_t* bits, uint64_t n, uint64_t unit, uint64_t count, bool value, size_t limit) {
  Writer writer(value ? 0 : kInverted, unit, count, limit);
  std::vector<uint64_t> gaps;
  gaps.reserve(kBlock);
  uint64_t position = 0;
  for_runs(bits, n, unit, value, [&](uint64_t begin, uint64_t end) {
    gaps.push_back(begin - position);
    for (uint64_t i = begin;;) {
      if (gaps.size() == kBlock) {
        writer.part(gaps);
        gaps.clear();
        if (writer.too_long()) return false;
      }
      if (++i == end) break;
      gaps.push_back(0);
    }
    position = end;
    return true;
  });
  if (!gaps.empty()) writer.part(gaps);
  return writer.too_long() ? std::string() : writer.take();
}

std::string encode_runs(const uint8_t* bits, uint64_t n, uint64_t unit, uint64_t count, size_t limit) {
  Writer writer(kRuns, unit, count, limit);
  std::vector<uint64_t> before, lengths;
  uint64_t position = 0;
  for_runs(bits, n, unit, true, [&](uint64_t begin, uint64_t end) {
    before.push_back(begin - position);
    lengths.push_back(end - begin - 1);
    position = end;
    if (before.size() < kBlock) return true;
    writer.part(before);
    writer.part(lengths);
    before.clear();
    lengths.clear();
    return !writer.too_long();
  });
  if (!before.empty()) {
    writer.part(before);
    writer.part(lengths);
  }
  return writer.too_long() ? std::string() : writer.take();
}

}  // namespace

std::string encode_mask(const uint8_t* bits, uint64_t n, size_t limit) {
  const Structure found = structure_of(bits, n);
  const uint64_t units = (n + found.unit - 1) / found.unit;
  // A last group that is cut short is active or not like any other.
  const uint64_t active = (found.active + found.unit - 1) / found.unit;
  const bool value = 2 * active <= units;
  const uint64_t symbols = value ? active : units - active;
  std::string best = encode_gaps(bits, n, found.unit, symbols, value, limit);
  if (10 * found.runs <= 9 * symbols) {
    std::string runs = encode_runs(bits, n, found.unit, found.runs, best.empty() ? limit : best.size());
    if (!runs.empty()) return runs;
  }
  return best;
}

const char* decode_mask(const uint8_t* stream, size_t size, uint8_t* bits, uint64_t n) {
  return decode_checked(stream, size, bits, n);
}

}  // namespace sparseopt
