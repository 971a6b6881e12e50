// Partial results of an item that several CTAs have worked on, in memory: O that has not been
// divided, a row after another, then the rows' references and sums.
#pragma once

#include "device/launch.cuh"
#include "kernels/forward_cached/packed_rows.cuh"

namespace jax_fa3 {

template <class T>
struct Partials {
  static constexpr int kFloats = T::kBlockRows * (T::kHeadDimV + 2);

  const ForwardCachedParams& p;
  const int number;  // of the CTA in its group

  CUTE_DEVICE float* of(const Piece& piece, int part) const {
    return p.partials + piece.partial(part, p.heads_at_once, number) * kFloats;
  }
  CUTE_DEVICE float* mine(const Piece& piece) const {
    return of(piece, int(blockIdx.x) / p.heads_at_once - piece.parts.first_group);
  }

  // Elements 4 quad .. 4 quad + 3 of a row.
  CUTE_DEVICE static void store(float* partial, int row, int quad, const RowPart& x) {
    reinterpret_cast<float4*>(partial)[row * (T::kHeadDimV / 4) + quad] = x.output;
    if (quad != 0) return;
    float* const statistics = partial + T::kBlockRows * T::kHeadDimV;
    statistics[row] = x.reference;
    statistics[T::kBlockRows + row] = x.sum;
  }
  // Of another CTA.
  CUTE_DEVICE static RowPart load(const float* partial, int row, int quad) {
    const float* const statistics = partial + T::kBlockRows * T::kHeadDimV;
    return {__ldcg(reinterpret_cast<const float4*>(partial) + row * (T::kHeadDimV / 4) + quad),
            __ldcg(statistics + row), __ldcg(statistics + T::kBlockRows + row)};
  }

  // All parts together, in the order of their keys.
  CUTE_DEVICE RowPart fold(const Piece& piece, int row, int quad) const {
    constexpr int kAtOnce = 8;  // loads under way
    RowPart all;
    CUTE_NO_UNROLL
    for (int first = 0; first < piece.parts.count; first += kAtOnce) {
      RowPart parts[kAtOnce];
      CUTE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i < piece.parts.count) parts[i] = load(of(piece, first + i), row, quad);
      }
      CUTE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) all.add(parts[i]);
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
