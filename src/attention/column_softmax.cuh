// Online softmax of a warpgroup's S^T = K Q^T: rows are keys, columns are queries. As
// attention/softmax.cuh it has a reference for each query that moves only when a logit has outgrown
// it by more than `threshold`; here a query's logits are spread over all of the warpgroup's warps.
#pragma once

#include <cfloat>

#include "attention/score.cuh"
#include "device/warpgroup.cuh"

namespace jax_fa3 {

// A thread has two neighbouring columns of every eight; their numbers among its own are
// column_of(element of an accumulator).
template <int kColumns>
struct ColumnSoftmax {
  static constexpr int kOwn = kColumns / 4;
  static constexpr int kWarps = kWarpgroupThreads / 32;
  // A value of each column from each warp.
  using Exchange = float[kWarps][kColumns];

  float threshold;
  float reference[kOwn];  // scores; at first below every one, and finite
  float sum[kOwn];        // this thread's share, until gather()
  float correction[kOwn];

  CUTE_DEVICE explicit ColumnSoftmax(float threshold) : threshold(threshold) {
    CUTE_UNROLL
    for (int j = 0; j < kOwn; ++j) {
      reference[j] = -FLT_MAX;
      sum[j] = 0.f;
    }
  }

  // The number of an element's column among the thread's; and the column.
  CUTE_DEVICE static constexpr int own(int element) {
    return (element / 4 * 2 + element % 2) % kOwn;
  }
  CUTE_DEVICE static int column(int own) { return thread_col() + own / 2 * 8 + own % 2; }

  // P = exp2((S - reference) * scale_log2). Returns whether one of this thread's logits has
  // outgrown its reference: then P does not count.
  template <class Accumulator>
  CUTE_DEVICE bool exponentiate(const Accumulator& tS, Accumulator& tP, float scale_log2) const {
    float most = -INFINITY;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      const float x = (tS(i) - reference[own(i)]) * scale_log2;
      most = fmaxf(most, x);
      tP(i) = exp2_approx(x);
    }
    return most > threshold;
  }

  template <class Accumulator>
  CUTE_DEVICE void add(const Accumulator& tP) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tP); ++i) sum[own(i)] += tP(i);
  }

  // Moves the references to what the columns' logits ask for; `correction` is what O is to be
  // multiplied with. The warpgroup meets at `barrier`; it must have met since it last read
  // `exchange`.
  template <class Accumulator>
  CUTE_DEVICE void follow(const Accumulator& tS, float scale_log2, Exchange& exchange,
                          std::uint32_t barrier) {
    float most[kOwn];
    CUTE_UNROLL
    for (int j = 0; j < kOwn; ++j) most[j] = -INFINITY;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) most[own(i)] = fmaxf(most[own(i)], tS(i));
    const auto larger = [](float a, float b) { return fmaxf(a, b); };
    reduce(most, larger, exchange, barrier);
    CUTE_UNROLL
    for (int j = 0; j < kOwn; ++j) {
      const float moved = fmaxf(most[j], reference[j]);
      correction[j] = exp2_approx((reference[j] - moved) * scale_log2);
      sum[j] *= correction[j];
      reference[j] = moved;
    }
  }

  // Multiplies what has the same columns.
  template <class Accumulator>
  CUTE_DEVICE static void scale_columns(Accumulator& tO, const float (&factor)[kOwn]) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tO); ++i) tO(i) *= factor[own(i)];
  }

  // Makes `sum` that of all rows; as follow() for barrier and exchange.
  CUTE_DEVICE void gather(Exchange& exchange, std::uint32_t barrier) {
    reduce(
        sum, [](float a, float b) { return a + b; }, exchange, barrier);
  }

 private:
  template <class Operation>
  CUTE_DEVICE static void reduce(float (&value)[kOwn], const Operation& operation,
                                 Exchange& exchange, std::uint32_t barrier) {
    const int warp = threadIdx.x % kWarpgroupThreads / 32, lane = threadIdx.x % 32;
    CUTE_UNROLL
    for (int j = 0; j < kOwn; ++j) {
      CUTE_UNROLL
      for (int step = 4; step < 32; step *= 2) {
        value[j] = operation(value[j], __shfl_xor_sync(0xffffffff, value[j], step));
      }
      if (lane < 4) exchange[warp][column(j)] = value[j];
    }
    cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, barrier);
    CUTE_UNROLL
    for (int j = 0; j < kOwn; ++j) {
      value[j] = exchange[0][column(j)];
      CUTE_UNROLL
      for (int w = 1; w < kWarps; ++w) value[j] = operation(value[j], exchange[w][column(j)]);
    }
  }
};

}  // namespace jax_fa3
