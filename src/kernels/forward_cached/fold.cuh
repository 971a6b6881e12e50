// Partial results of an item that several CTAs have worked on, in memory: O that has not been
// divided, a column after another, then the columns' references and sums.
#pragma once

#include "device/launch.cuh"
#include "device/reduce.cuh"
#include "kernels/forward_cached/traits.cuh"

namespace jax_fa3 {

// Four rows of a column of O, with the column's reference (log2 units) and sum.
struct ColumnPart {
  float4 output{0.f, 0.f, 0.f, 0.f};
  float reference = -FLT_MAX;
  float sum = 0.f;

  // Adds what other keys give. What has seen none changes nothing.
  CUTE_DEVICE void add(const ColumnPart& other) {
    const float moved = fmaxf(reference, other.reference);
    const float mine = exp2_approx(reference - moved);
    const float theirs = exp2_approx(other.reference - moved);
    output.x = output.x * mine + other.output.x * theirs;
    output.y = output.y * mine + other.output.y * theirs;
    output.z = output.z * mine + other.output.z * theirs;
    output.w = output.w * mine + other.output.w * theirs;
    sum = sum * mine + other.sum * theirs;
    reference = moved;
  }
};

template <class T>
struct Partials {
  static constexpr int kFloats = T::kColumns * (T::kHeadDimV + 2);

  const ForwardCachedParams& p;

  CUTE_DEVICE float* of(const Piece& piece, int part) const {
    return p.partials + piece.partial(part, p.heads_at_once) * kFloats;
  }
  CUTE_DEVICE float* mine(const Piece& piece) const {
    return of(piece, int(blockIdx.x) / p.heads_at_once - piece.parts.first_group);
  }

  // Rows 4 quad .. 4 quad + 3 of a column.
  CUTE_DEVICE static void store(float* partial, int column, int quad, const ColumnPart& x) {
    reinterpret_cast<float4*>(partial)[column * (T::kHeadDimV / 4) + quad] = x.output;
    if (quad != 0) return;
    float* const statistics = partial + T::kColumns * T::kHeadDimV;
    statistics[column] = x.reference;
    statistics[T::kColumns + column] = x.sum;
  }
  // Of another CTA.
  CUTE_DEVICE static ColumnPart load(const float* partial, int column, int quad) {
    const float* const statistics = partial + T::kColumns * T::kHeadDimV;
    return {__ldcg(reinterpret_cast<const float4*>(partial) + column * (T::kHeadDimV / 4) + quad),
            __ldcg(statistics + column), __ldcg(statistics + T::kColumns + column)};
  }

  // All parts together, in the order of their keys.
  CUTE_DEVICE ColumnPart fold(const Piece& piece, int column, int quad) const {
    constexpr int kAtOnce = 8;  // loads under way
    ColumnPart all;
    CUTE_NO_UNROLL
    for (int first = 0; first < piece.parts.count; first += kAtOnce) {
      ColumnPart parts[kAtOnce];
      CUTE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i < piece.parts.count) parts[i] = load(of(piece, first + i), column, quad);
      }
      CUTE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) all.add(parts[i]);
    }
    return all;
  }

  // Tells the other parts' CTAs that this one's is in memory; whether it was the last. One thread,
  // which has met those that have written it before, and meets those that read the others after.
  CUTE_DEVICE bool arrive_last(const Piece& piece) const {
    await_grid_before();  // the counters are 0
    int* const counter = p.counters + piece.counter(p.heads_at_once);
    return fetch_add_acq_rel(counter, 1) == piece.parts.count - 1;
  }
};

}  // namespace jax_fa3
