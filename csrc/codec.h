// The mask codec (codec.cpp), as bindings.cpp gives it to Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace sparseopt {

constexpr int kMaxBits = 48;  // masks have fewer than 2^48 entries

// Codes a packed mask of n entries, unused bits zero; empty if that takes `limit` bytes or more.
std::string encode_mask(const uint8_t* bits, uint64_t n, size_t limit);

// Flips the coded entries of a packed mask of n entries -> what is wrong with the stream, or nullptr. Never throws.
const char* decode_mask(const uint8_t* stream, size_t size, uint8_t* bits, uint64_t n);

}  // namespace sparseopt
