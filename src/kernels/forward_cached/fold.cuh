// Partial results of an item that several CTAs have worked on, in memory: O that has not been
// divided, then each row's reference and sum. O is a row after another where rows are few; where
// they are many it is as the threads of a warpgroup have it (rows_consumer.cuh).
#pragma once

#include "device/launch.cuh"
#include "device/reduce.cuh"
#include "kernels/forward_cached/params.cuh"

namespace jax_fa3 {

// Four elements of a row of O that has not been divided, with the row's reference and sum.
// References are scores: of huge ones only the difference can be scaled exactly.
struct RowPart {
  float4 output{0.f, 0.f, 0.f, 0.f};
  float reference = -FLT_MAX;
  float sum = 0.f;

  // Adds what other keys give. What has seen none changes nothing. The largest reference first, so
  // that no exponential waits for another.
  template <int kCount>
  CUTE_DEVICE void add(const RowPart (&others)[kCount], float scale_log2) {
    float moved = reference;
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) moved = fmaxf(moved, others[i].reference);
    const float mine = exp2_approx((reference - moved) * scale_log2);
    output.x *= mine, output.y *= mine, output.z *= mine, output.w *= mine;
    sum *= mine;
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const float theirs = exp2_approx((others[i].reference - moved) * scale_log2);
      output.x += others[i].output.x * theirs;
      output.y += others[i].output.y * theirs;
      output.z += others[i].output.z * theirs;
      output.w += others[i].output.w * theirs;
      sum += others[i].sum * theirs;
    }
    reference = moved;
  }

  CUTE_DEVICE float lse(float scale_log2) const {
    return reference * scale_log2 * kLn2 + logf(sum);
  }
};

// Elements 4 quad .. 4 quad + 3 of the result of row `row` of [tokens, h_q], and with the first of
// them its LSE.
template <class Element>
CUTE_DEVICE void store_result(const ForwardCachedParams& p, std::int64_t row, int quad,
                              const RowPart& x, bool sees_nothing) {
  const bool empty = sees_nothing || x.sum == 0.f;
  const float inverse = empty ? 0.f : 1.f / x.sum;
  if (quad == 0) p.lse[row] = empty ? -INFINITY : x.lse(p.softmax_scale_log2);
  if (4 * quad >= p.head_dim_v) return;
  float4 output{0.f, 0.f, 0.f, 0.f};
  if (!empty) {
    output = {x.output.x * inverse, x.output.y * inverse, x.output.z * inverse,
              x.output.w * inverse};
  }
  const std::int64_t at = row * p.head_dim_v + 4 * quad;
  if (p.out_float32) {
    *reinterpret_cast<float4*>(static_cast<float*>(p.out) + at) = output;
  } else {
    cutlass::NumericArrayConverter<Element, float, 4> converter;
    *reinterpret_cast<cutlass::Array<Element, 4>*>(static_cast<Element*>(p.out) + at) =
        converter(reinterpret_cast<const cutlass::Array<float, 4>&>(output));
  }
}

template <class T>
struct Partials {
  static constexpr int kFloats = T::kBlockRows * (T::kHeadDimV + 2);

  const ForwardCachedParams& p;
  const int number;  // of the CTA in its group

  CUTE_DEVICE float* of(const Piece& piece, int part) const {
    return p.partials + std::int64_t{piece.partial(part, p.heads_at_once, number)} * kFloats;
  }
  CUTE_DEVICE float* mine(const Piece& piece) const {
    return of(piece, int(blockIdx.x) / p.heads_at_once - piece.parts.first_group);
  }

  // Elements 4 quad .. 4 quad + 3 of a row.
  CUTE_DEVICE static void store(float* partial, int row, int quad, const RowPart& x) {
    reinterpret_cast<float4*>(partial)[row * (T::kHeadDimV / 4) + quad] = x.output;
    if (quad == 0) store_statistics(partial, row, x.reference, x.sum);
  }
  // A row's reference and sum.
  CUTE_DEVICE static void store_statistics(float* partial, int row, float reference, float sum) {
    reinterpret_cast<float2*>(partial + T::kBlockRows * T::kHeadDimV)[row] = {reference, sum};
  }
  // Of another CTA.
  CUTE_DEVICE static float2 load_statistics(const float* partial, int row) {
    return __ldcg(reinterpret_cast<const float2*>(partial + T::kBlockRows * T::kHeadDimV) + row);
  }
  CUTE_DEVICE static RowPart load(const float* partial, int row, int quad) {
    const float2 statistics = load_statistics(partial, row);
    return {__ldcg(reinterpret_cast<const float4*>(partial) + row * (T::kHeadDimV / 4) + quad),
            statistics.x, statistics.y};
  }

  // All parts together, in the order of their keys.
  CUTE_DEVICE RowPart fold(const Piece& piece, int row, int quad) const {
    constexpr int kAtOnce = 16;  // parts whose loads are under way
    RowPart all;
    CUTE_NO_UNROLL
    for (int first = 0; first < piece.parts.count; first += kAtOnce) {
      RowPart parts[kAtOnce];
      CUTE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i < piece.parts.count) parts[i] = load(of(piece, first + i), row, quad);
      }
      all.add(parts, p.softmax_scale_log2);
    }
    return all;
  }

  // Tells the other parts' CTAs that this one's is in memory; whether it was the last. One thread,
  // which has met those that have written it before, and meets those that read the others after.
  // What is folded by itself has a counter of its own: number `which` of a CTA's.
  CUTE_DEVICE bool arrive_last(const Piece& piece, int counters, int which) const {
    await_grid_before();  // the counters are 0
    int* const counter = p.counters + piece.counter(p.heads_at_once, number) * counters + which;
    return fetch_add_acq_rel(counter, 1) == piece.parts.count - 1;
  }
};

}  // namespace jax_fa3
