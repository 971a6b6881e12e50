// Deterministic dQ: the order in which key blocks add to a query block. One warp for each consumer
// warpgroup waits for the turns and passes them on, so that the consumers pay two barriers of
// their own SM and never wait for memory.
#pragma once

#include "backward/traits.cuh"

namespace jax_fa3 {

// Without rotation key blocks add in descending order: that in which the causal mask lets them
// reach a query block, and that in which the scheduler hands them out, so that nobody waits for a
// tile not yet begun. With it they wait in a circle, and all of a head's must be under way
// together.
template <class T>
CUTE_DEVICE void keep_order(const BackwardParams& p, typename T::SharedStorage& shared,
                            int warpgroup) {
  using NamedBarrier = cutlass::arch::NamedBarrier;
  const bool leader = threadIdx.x % 32 == 0;
  TileNumbers::Cursor tiles_cursor;
  for (int index; (index = shared.tiles.read(tiles_cursor)) < p.scheduler.num_tiles;) {
    const BackwardTile tile = BackwardTile::make<T>(p, index);
    for (QueryWalk walk = tile.walk<T>(p); walk.more(); walk.next()) {
      const int turn = tile.turn<T>(p, walk.m);
      int* const semaphore = p.semaphore + walk.block() * T::kConsumers + warpgroup;
      if (leader) {
        while (load_acquire(semaphore) != turn) {
        }
      }
      __syncwarp();
      NamedBarrier::arrive(T::kOrderThreads, T::kTurn + warpgroup);
      NamedBarrier::sync(T::kOrderThreads, T::kAdded + warpgroup);
      if (leader) {
        fence_gpu();  // the warpgroup's additions have been performed, not only issued
        store_release(semaphore, turn + 1);
      }
    }
    __syncwarp();
    if (leader) shared.tiles.ring.empty[tiles_cursor.stage].arrive();
    tiles_cursor.advance();
  }
}

}  // namespace jax_fa3
