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

// What a Mask says, lengths and a window that moves with the row; and row intervals, which are read
// from memory in the tiles that ask: registers that held them through the loop would be missed
// there.
struct RowIntervals {
  // A tile of S: rows are queries from `row0`, columns are keys from `key0`.
  template <class Accumulator>
  CUTE_DEVICE static void mask_scores(Accumulator& tS, const Mask& mask, const Intervals& intervals,
                                      int row0, int key0) {
    int low[2], high[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = row0 + thread_row() + 8 * r;
      low[r] = row + mask.first - key0;
      high[r] = min(row + mask.last, mask.key_length - 1) - key0;
      if (intervals.plane != nullptr) {
        const Interval keys = load(intervals.rows(), min(row, mask.query_length - 1));
        low[r] = max(low[r], keys.begin - key0);
        high[r] = min(high[r], keys.end - 1 - key0);
      }
    }
    mask_columns(tS, low, high);
  }

  // A tile of S^T: rows are keys from `key0`, columns are rows from `row0` of the work tile's query
  // head number `head`.
  template <class Accumulator>
  CUTE_DEVICE static void mask_scores_transposed(Accumulator& tSt, const Mask& mask,
                                                 const Intervals& intervals, int row0, int key0,
                                                 int head) {
    const std::int64_t plane = std::int64_t(head) * intervals.plane_stride;
    int low[2], high[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int key = key0 + thread_row() + 8 * r;
      low[r] = key < mask.key_length ? key - mask.last - row0 : kUnbounded;
      high[r] = key - mask.first - row0;
      if (intervals.keys != nullptr) {
        const Interval rows = load(at(intervals.keys, plane), min(key, mask.key_length - 1));
        low[r] = max(low[r], rows.begin - row0);
        high[r] = min(high[r], rows.end - 1 - row0);
      }
    }
    mask_columns(tSt, low, high);
    if (intervals.plane != nullptr && intervals.keys == nullptr) {
      mask_by_rows(tSt, at(intervals.rows(), plane), mask.query_length - 1, row0, key0);
    }
  }

 private:
  CUTE_DEVICE static Interval load(const Interval* intervals, int i) {
    const int2 both = __ldg(reinterpret_cast<const int2*>(intervals) + i);
    return {both.x, both.y};
  }
  // The same interval in a plane `words` further on.
  CUTE_DEVICE static const Interval* at(const Interval* intervals, std::int64_t words) {
    return reinterpret_cast<const Interval*>(reinterpret_cast<const std::int32_t*>(intervals) +
                                             words);
  }

  // S^T where what sees a key is no interval: every column asks its own row.
  template <class Accumulator>
  CUTE_DEVICE static void mask_by_rows(Accumulator& tSt, const Interval* rows, int last_row,
                                       int row0, int key0) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tSt); ++i) {
      if (accumulator_row(i) != 0) continue;  // two keys, the same column: below
      const int row = row0 + thread_col() + accumulator_col(i);
      const Interval keys = load(rows, min(row, last_row));
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int key = key0 + thread_row() + 8 * r;
        if (key < keys.begin || key >= keys.end) tSt(i + 2 * r) = -INFINITY;
      }
    }
  }
};

}  // namespace jax_fa3
