// Masks in a warpgroup's registers: a tile of scores is set to -inf where a row does not see a key.
//
// A kernel's Masking is one of these policies. It says what a row sees, of S, whose rows are
// queries, and of S^T, whose rows are keys; which tiles have to ask is attention/mask.h's.
#pragma once

#include <cmath>

#include "attention/mask.h"
#include "device/mma.cuh"

namespace jax_fa3 {

// Sets to -inf what lies outside [low[r], high[r]], columns counted from the tile's first one.
template <class Accumulator>
CUTE_DEVICE void mask_columns(Accumulator& tS, const int (&low)[2], const int (&high)[2]) {
  int thread_low[2], thread_high[2];
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    thread_low[r] = low[r] - thread_col();
    thread_high[r] = high[r] - thread_col();
  }
  CUTE_UNROLL
  for (int i = 0; i < cute::size(tS); ++i) {
    const int r = accumulator_row(i), col = accumulator_col(i);
    if (col < thread_low[r] || col > thread_high[r]) tS(i) = -INFINITY;
  }
}

// What the four integers of a Mask say: lengths, and a window that moves with the row.
struct Window {
  // A tile of S: rows are queries from `row0`, columns are keys from `key0`.
  template <class Accumulator>
  CUTE_DEVICE static void mask_scores(Accumulator& tS, const Mask& mask, int row0, int key0) {
    int low[2], high[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = row0 + thread_row() + 8 * r;
      low[r] = row + mask.first - key0;
      high[r] = min(row + mask.last, mask.key_length - 1) - key0;
    }
    mask_columns(tS, low, high);
  }

  // A tile of S^T: rows are keys from `key0`, columns are queries from `row0`.
  template <class Accumulator>
  CUTE_DEVICE static void mask_scores_transposed(Accumulator& tSt, const Mask& mask, int row0,
                                                 int key0) {
    int low[2], high[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int key = key0 + thread_row() + 8 * r;
      low[r] = key < mask.key_length ? key - mask.last - row0 : kUnbounded;
      high[r] = key - mask.first - row0;
    }
    mask_columns(tSt, low, high);
  }
};

}  // namespace jax_fa3
