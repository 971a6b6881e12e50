// What a kernel over caches is launched with, and the queue of its pieces.
#pragma once

#include <cfloat>

#include "attention/pages.h"
#include "attention/score.cuh"
#include "device/pipeline.cuh"
#include "device/warpgroup.cuh"
#include "kernels/forward_cached/pieces.h"

namespace jax_fa3 {

struct ForwardCachedParams {
  CUtensorMap key;    // (page, slot, kv head, column), boxes of box_rows slots
  CUtensorMap value;  // the same
  CachedIndex index;
  CachedExtents extents;
  Pages pages;
  int box_rows;
  int num_heads;  // of query
  int num_heads_kv;
  Divisor heads_at_once;  // kv heads that a group of CTAs works on together
  int rounds;             // of them
  Divisor groups;
  bool units_fit_int;  // most_units() is below 2^30
  int head_dim;
  int head_dim_v;
  float softmax_scale_log2;
  float rescale_threshold;
  bool out_float32;
  const void* query;  // [tokens, h_q, d]
  void* out;          // [tokens, h_q, d_v]
  float* lse;         // [tokens, h_q]
  float* partials;    // [grid, 2, partial_floats]
  int* counters;      // [grid], 0 at launch
};

struct PieceQueue {
  static constexpr int kStages = 4;
  using Cursor = RingCursor<kStages>;

  RingBarriers<kStages> ring;
  Barrier parts_known[kStages];  // a piece's parts follow the rest of it
  Piece pieces[kStages];

  CUTE_DEVICE void init(int num_readers) {
    ring.init(num_readers);
    for (Barrier& barrier : parts_known) barrier.init(1);
  }
  CUTE_DEVICE void wait_parts(const Cursor& cursor) {
    parts_known[cursor.stage].wait(cursor.phase);
  }
};

}  // namespace jax_fa3
