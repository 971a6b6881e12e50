// Masking and online softmax on a warpgroup's accumulator of S = Q K^T (Algorithm 2 of
// arXiv:2407.08608), with the conditional rescale: O, l and P refer to a reference maximum that
// follows the true one only when it has grown by more than `threshold`; P stays <= 2^threshold.
#pragma once

#include <cmath>

#include "attention/mask.h"
#include "device/mma.cuh"

namespace jax_fa3 {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

CUTE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The first row and the first column of this thread's accumulator within its 64-row tile.
CUTE_DEVICE int thread_row() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }
CUTE_DEVICE int thread_col() { return threadIdx.x % 4 * 2; }

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

// Masks a tile of S: rows are queries from `row0`, columns are keys from `key0`.
template <class Accumulator>
CUTE_DEVICE void mask_scores(Accumulator& tS, const Mask& mask, int row0, int key0) {
  int low[2], high[2];
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int row = row0 + thread_row() + 8 * r;
    low[r] = row + mask.first - key0;
    high[r] = min(row + mask.last, mask.key_length - 1) - key0;
  }
  mask_columns(tS, low, high);
}

// Masks a tile of S^T: rows are keys from `key0`, columns are queries from `row0`.
template <class Accumulator>
CUTE_DEVICE void mask_scores_transposed(Accumulator& tSt, const Mask& mask, int row0, int key0) {
  int low[2], high[2];
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int key = key0 + thread_row() + 8 * r;
    low[r] = key < mask.key_length ? key - mask.last - row0 : kUnbounded;
    high[r] = key - mask.first - row0;
  }
  mask_columns(tSt, low, high);
}

struct OnlineSoftmax {
  // Raw logits; the reference maximum of each of the thread's two rows.
  float row_max[2] = {-INFINITY, -INFINITY};
  // This thread's share of the row sums, until finish() adds up the quad's.
  float row_sum[2] = {0.f, 0.f};
  // What O must be multiplied with before the next P V is added, if `rescale`.
  float correction[2] = {1.f, 1.f};

  // Turns S into P = exp2((S - max) * scale_log2) and updates max and sum. Returns, uniformly
  // over the warp, whether the reference maximum moved.
  template <class Accumulator>
  CUTE_DEVICE bool update(Accumulator& tS, float scale_log2, float threshold) {
    float tile_max[2] = {row_max[0], row_max[1]};
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      const int r = accumulator_row(i);
      tile_max[r] = fmaxf(tile_max[r], tS(i));
    }
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      tile_max[r] = fmaxf(tile_max[r], __shfl_xor_sync(0xffffffff, tile_max[r], 1));
      tile_max[r] = fmaxf(tile_max[r], __shfl_xor_sync(0xffffffff, tile_max[r], 2));
    }
    // -inf - -inf is NaN, and a comparison with NaN is false: an empty row does not grow.
    const bool rescale =
        __any_sync(0xffffffff, (tile_max[0] - row_max[0]) * scale_log2 > threshold ||
                                   (tile_max[1] - row_max[1]) * scale_log2 > threshold);
    if (rescale) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        correction[r] = exp2_approx((row_max[r] - finite(tile_max[r])) * scale_log2);
        row_max[r] = tile_max[r];
        row_sum[r] *= correction[r];
      }
    }
    float offset[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) offset[r] = finite(row_max[r]) * scale_log2;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      const int r = accumulator_row(i);
      tS(i) = exp2_approx(fmaf(tS(i), scale_log2, -offset[r]));
      row_sum[r] += tS(i);
    }
    return rescale;
  }

  template <class Accumulator>
  CUTE_DEVICE void rescale(Accumulator& tO) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tO); ++i) tO(i) *= correction[accumulator_row(i)];
  }

  // O /= l, and the rows' LSE in natural log. A row that saw no key gives 0 and -inf.
  template <class Accumulator>
  CUTE_DEVICE void finish(Accumulator& tO, float softmax_scale, const bool (&exists)[2],
                          float (&lse)[2]) {
    float inverse[2];
    bool empty[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(0xffffffff, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(0xffffffff, row_sum[r], 2);
      empty[r] = !exists[r] || row_sum[r] == 0.f;
      inverse[r] = 1.f / row_sum[r];
      lse[r] = empty[r] ? -INFINITY : row_max[r] * softmax_scale + logf(row_sum[r]);
    }
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tO); ++i) {
      const int r = accumulator_row(i);
      tO(i) = empty[r] ? 0.f : tO(i) * inverse[r];
    }
  }

 protected:
  // The reference of a row that has seen no key yet: any finite value gives exp2(-inf) = 0.
  CUTE_DEVICE static float finite(float maximum) { return maximum == -INFINITY ? 0.f : maximum; }
};

}  // namespace jax_fa3
