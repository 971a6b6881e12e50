// A dense boolean mask in a warpgroup's registers: bits of a table (dense_mask.h) set scores to
// -inf. Which tiles have to ask is DenseMask::classify's.
#pragma once

#include <cmath>

#include "attention/dense_mask.h"
#include "device/mma.cuh"

namespace jax_fa3 {

// Of the thread's two rows, columns from bit `bit` of `lines` on, a multiple of 16; a line's words
// are `step` apart.
template <class Accumulator>
CUTE_DEVICE void mask_by_lines(Accumulator& tS, const std::uint32_t* const (&lines)[2], int step,
                               int bit) {
  constexpr int kCols = decltype(cute::size(tS))::value * 2;
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    const std::uint32_t* const line = lines[r] + bit / 32 * step;
    std::uint32_t next = __ldg(line);
    CUTE_UNROLL
    for (int col = 0; col < kCols; col += 32) {
      std::uint32_t word = next;
      if (col + 32 < kCols || kCols % 32 != 0) next = __ldg(line + (col / 32 + 1) * step);
      if constexpr (kCols % 32 != 0) word = __funnelshift_r(word, next, bit % 32);
      word >>= thread_col();
      CUTE_UNROLL
      for (int i = col / 2 + 2 * r; i < col / 2 + 16 && i < kCols / 2; i += 4) {
        if (!(word >> accumulator_col(i) % 32 & 1)) tS(i) = -INFINITY;
        if (!(word >> accumulator_col(i + 1) % 32 & 1)) tS(i + 1) = -INFINITY;
      }
    }
  }
}

// A tile of S: rows are queries from `row0`, columns are keys from `key0`.
template <class Accumulator>
CUTE_DEVICE void mask_by_bits(Accumulator& tS, const DenseMask& mask, int row0, int key0) {
  const std::uint32_t* lines[2];
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    lines[r] = mask.row_bits(min(row0 + thread_row() + 8 * r, mask.layout.rows - 1));
  }
  mask_by_lines(tS, lines, 1, key0);
}

// A tile of S^T: rows are keys from `key0`, columns are rows from `row0`.
template <class Accumulator>
CUTE_DEVICE void mask_by_bits_transposed(Accumulator& tSt, const DenseMask& mask, int row0,
                                         int key0) {
  const std::uint32_t* lines[2];
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    lines[r] = mask.key_bits(min(key0 + thread_row() + 8 * r, mask.layout.seqlen_k - 1));
  }
  mask_by_lines(tSt, lines, mask.key_bits_step(), row0);
}

}  // namespace jax_fa3
