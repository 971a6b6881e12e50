// The layout of value that the float8 kernels contract P with: "prepared" value,
//
//   [b, h_kv, d_v, padded_keys(s_k)]   V^T, its keys padded to whole blocks of 128
//
// in which the keys of each group of 16 stand in the order
//
//   position   0 1 2 3   4  5  6  7    8  9 10 11   12 13 14 15      4 c + i
//   key        0 1 8 9   2  3 10 11    4  5 12 13    6  7 14 15      8 (i / 2) + 2 c + i % 2
//
// Why: of 16 neighbouring scores of a row, a thread of WGMMA's accumulator (m64nN) holds columns
// 2c, 2c + 1, 8 + 2c, 8 + 2c + 1, where c is its number in the quad. As the operand A of an 8-bit
// WGMMA (m64nNk32) it has to hold contraction positions 4c .. 4c + 3. With V's keys in this order
// the four scores, rounded and packed, are the operand: P needs no exchange between threads. A sum
// over keys does not depend on their order. tests/cpp/prepared_value_test.cc proves it from the
// PTX ISA's fragment layouts, kernels/forward_float8/traits.cuh asserts it from CuTe's.
//
// Keys past the end may hold anything: the kernel clears them in shared memory.
#pragma once

#include <cstdint>

#include "call/types.h"

namespace jax_fa3 {

constexpr int kPreparedBlock = 128;  // keys
constexpr int kPreparedGroup = 16;   // keys

// Key at position `position` of a group, 0 <= position < 16.
JFA_HD constexpr int prepared_key(int position) {
  return position % 4 / 2 * 8 + position / 4 * 2 + position % 2;
}

constexpr std::int64_t padded_keys(std::int64_t seqlen_k) {
  return ceil_div<std::int64_t>(seqlen_k, kPreparedBlock) * kPreparedBlock;
}

// The bytes of word `word` of a group (positions 4 word .. 4 word + 3, the lowest byte first) whose
// keys are below `valid`, as a mask.
JFA_HD constexpr std::uint32_t prepared_word_mask(int word, int valid) {
  std::uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) {
    if (prepared_key(4 * word + i) < valid) mask |= 0xffu << (8 * i);
  }
  return mask;
}

}  // namespace jax_fa3
