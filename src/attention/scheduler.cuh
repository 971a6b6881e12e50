// Which CTA takes which work tile when.
//
// Tiles are numbered: groups of heads whose operands fit L2 together outermost, then blocks, then
// the heads of the group; where tiles differ in length, longest first within a group. A persistent
// CTA begins with the tile of its own number and then takes
//   by counter: the lowest number nobody has taken, from a counter in memory;
//   static:     one of each further round of the grid, every time a place further on, or a CTA
//   could
//               meet a sequence's ragged last block in all rounds and another in none. Needs no
//               memory; enough where tiles are nearly equal.
#pragma once

#include "base/types.h"
#include "device/pipeline.cuh"
#include "device/reduce.cuh"

namespace jax_fa3 {

struct WorkTile {
  int block;  // of query rows in the forward pass, of keys in the backward pass
  int head;
  int batch;
};

struct TileScheduler {
  int num_blocks;  // of one (batch, head)
  int num_heads;
  int num_batch_heads;  // batch * num_heads
  int heads_per_group;
  int num_tiles;
  bool last_block_first;
  int* counter;  // 0 at launch; null: static

  // The number of the tile after `index`; num_tiles or more after the last. One thread calls it.
  CUTE_DEVICE int next(int index) const {
    const int grid = gridDim.x;
    if (counter != nullptr) return grid + fetch_add(counter, 1);
    const int round = index / grid + 1;
    return round * grid + (int(blockIdx.x) + round) % grid;
  }

  CUTE_DEVICE WorkTile tile(int index) const {
    const int group = index / (heads_per_group * num_blocks);
    const int first = group * heads_per_group;
    const int heads = min(heads_per_group, num_batch_heads - first);
    const int rest = index - first * num_blocks;
    const int block = rest / heads;
    const int batch_head = first + rest - block * heads;
    return {last_block_first ? num_blocks - 1 - block : block, batch_head % num_heads,
            batch_head / num_heads};
  }
};

// The numbers of a CTA's work tiles on their way from the producer thread to the consumers, taken a
// tile ahead: four stages, so that the producer never waits for a tile to be stored.
struct TileNumbers {
  static constexpr int kStages = 4;
  using Cursor = RingCursor<kStages>;

  RingBarriers<kStages> ring;
  int number[kStages];

  CUTE_DEVICE void publish(int tile, Cursor& cursor) {
    wait_empty(ring, cursor);
    number[cursor.stage] = tile;
    ring.full[cursor.stage].arrive();
    cursor.advance();
  }
  // For whole warps. release(ring, cursor) must not come before a barrier of the warpgroup.
  CUTE_DEVICE int read(Cursor cursor) {
    wait_full(ring, cursor);
    return __shfl_sync(0xffffffff, number[cursor.stage], 0);
  }
};

}  // namespace jax_fa3
