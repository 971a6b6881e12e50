// A ring of shared-memory stages between one TMA producer thread and the consumer warpgroups.
//
// full[s]: one arrival (the producer's expect) and the bytes of the stage; consumers wait.
// empty[s]: one arrival per consumer warpgroup once it has read the stage; the producer waits.
// Where threads write and read stages themselves, one arrival of each of them.
#pragma once

#include "device/tma.cuh"

namespace jax_fa3 {

template <int kStages>
struct RingBarriers {
  TransactionBarrier full[kStages];
  Barrier empty[kStages];

  CUTE_DEVICE void init(int num_consumers, int num_producers = 1) {
    for (int s = 0; s < kStages; ++s) {
      full[s].init(num_producers);
      empty[s].init(num_consumers);
    }
  }
};

// One side's place in a ring. Producer and consumers each walk the stages with their own cursor.
template <int kStages>
struct RingCursor {
  int stage = 0;
  std::uint32_t phase = 0;

  CUTE_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  CUTE_DEVICE RingCursor before() const {
    return stage > 0 ? RingCursor{stage - 1, phase} : RingCursor{kStages - 1, phase ^ 1};
  }
};

// Producer: wait until the stage is free. A fresh ring is free: waiting for the phase before the
// first one returns at once.
template <int kStages>
CUTE_DEVICE void wait_empty(RingBarriers<kStages>& ring, RingCursor<kStages> cursor) {
  ring.empty[cursor.stage].wait(cursor.phase ^ 1);
}

// Producer: wait until the stage is free, then announce `bytes`.
template <int kStages>
CUTE_DEVICE TransactionBarrier& acquire(RingBarriers<kStages>& ring, RingCursor<kStages> cursor,
                                        std::uint32_t bytes) {
  wait_empty(ring, cursor);
  ring.full[cursor.stage].arrive_and_expect_tx(bytes);
  return ring.full[cursor.stage];
}

// The same for a producer that is a warp.
template <int kStages>
CUTE_DEVICE TransactionBarrier& acquire_by_warp(RingBarriers<kStages>& ring,
                                                RingCursor<kStages> cursor, std::uint32_t bytes) {
  wait_empty(ring, cursor);
  if (threadIdx.x % 32 == 0) ring.full[cursor.stage].arrive_and_expect_tx(bytes);
  __syncwarp();
  return ring.full[cursor.stage];
}

// Consumer: wait for the stage's bytes.
template <int kStages>
CUTE_DEVICE void wait_full(RingBarriers<kStages>& ring, RingCursor<kStages> cursor) {
  ring.full[cursor.stage].wait(cursor.phase);
}

// Consumer: this warpgroup has read the stage. One thread in 128 arrives; the WGMMAs that read
// the stage must have been waited for by all of them.
template <int kStages>
CUTE_DEVICE void release(RingBarriers<kStages>& ring, RingCursor<kStages> cursor) {
  if (threadIdx.x % 128 == 0) ring.empty[cursor.stage].arrive();
}

// The same where threads have read the stage themselves: each warp arrives when all of its own
// have.
template <int kStages>
CUTE_DEVICE void release_by_warp(RingBarriers<kStages>& ring, RingCursor<kStages> cursor) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ring.empty[cursor.stage].arrive();
}

}  // namespace jax_fa3
