// A dense boolean mask in a warpgroup's registers: bits of a table (dense_mask.h) set scores to
// -inf. Which tiles have to ask is DenseMask::classify's.
#pragma once

#include <cmath>

#include "attention/dense_mask.h"
#include "device/mma.cuh"

namespace jax_fa3 {

// The bits of the thread's two rows in kCols columns. They are loaded ahead of their use, under the
// product that makes the scores.
template <int kCols>
class MaskBits {
 public:
  CUTE_DEVICE MaskBits() {}  // not to be applied

  // Of a tile of S: rows are queries from `row0`, columns are keys from `key0`.
  CUTE_DEVICE static MaskBits of_rows(const DenseMask& mask, int row0, int key0) {
    return MaskBits(key0, 1,
                    [&](int row) { return mask.row_bits(min(row0 + row, mask.layout.rows - 1)); });
  }
  // Of a tile of S^T: rows are keys from `key0`, columns are rows from `row0`.
  CUTE_DEVICE static MaskBits of_keys(const DenseMask& mask, int row0, int key0) {
    return MaskBits(row0, mask.key_bits_step(), [&](int key) {
      return mask.key_bits(min(key0 + key, mask.layout.seqlen_k - 1));
    });
  }

  template <class Accumulator>
  CUTE_DEVICE void apply(Accumulator& tS) const {
    static_assert(decltype(cute::size(tS))::value * 2 == kCols);
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      CUTE_UNROLL
      for (int col = 0; col < kCols; col += 32) {
        std::uint32_t word = words_[r][col / 32];
        if constexpr (kIsSplit) word = __funnelshift_r(word, words_[r][col / 32 + 1], bit_ % 32);
        word >>= thread_col();
        CUTE_UNROLL
        for (int i = col / 2 + 2 * r; i < col / 2 + 16 && i < kCols / 2; i += 4) {
          if (!(word >> accumulator_col(i) % 32 & 1)) tS(i) = -INFINITY;
          if (!(word >> accumulator_col(i + 1) % 32 & 1)) tS(i + 1) = -INFINITY;
        }
      }
    }
  }

 private:
  static constexpr bool kIsSplit = kCols % 32 != 0;  // then a tile may begin within a word
  static constexpr int kWords = (kCols + 31) / 32 + kIsSplit;

  // From bit `bit` of lines on, a multiple of 16; a line's words are `step` apart.
  template <class LineOf>
  CUTE_DEVICE MaskBits(int bit, int step, const LineOf& line_of) : bit_(bit) {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const std::uint32_t* const line = line_of(thread_row() + 8 * r) + bit / 32 * step;
      CUTE_UNROLL
      for (int w = 0; w < kWords; ++w) words_[r][w] = __ldg(line + w * step);
    }
  }

  int bit_;
  std::uint32_t words_[2][kWords];
};

}  // namespace jax_fa3
