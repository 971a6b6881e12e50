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

#include <cutlass/cutlass.h>

#include "attention/mask.h"
#include "call/types.h"
#include "device/mma.cuh"
#include "device/pipeline.cuh"
#include "device/reduce.cuh"

namespace jax_fa3 {

struct WorkTile {
  int block;  // of query rows in the forward pass, of keys in the backward pass
  int head;
  int batch;
};

// What this CTA takes in a round of a static order.
CUTE_DEVICE int number_in_round(int round) {
  const int grid = gridDim.x;
  return round * grid + (int(blockIdx.x) + round) % grid;
}

struct TileScheduler {
  int num_blocks;  // of one (batch, head)
  int num_heads;
  int num_batch_heads;  // batch * num_heads
  int heads_per_group;
  int num_tiles;
  bool last_block_first;
  int* counter;  // 0 at launch; null: static

  // The number of the CTA's first tile.
  CUTE_DEVICE int first() const { return blockIdx.x; }

  // The number of the tile after `index`; num_tiles or more after the last. One thread calls it.
  CUTE_DEVICE int next(int index) const {
    if (counter != nullptr) return int(gridDim.x) + fetch_add(counter, 1);
    return number_in_round(index / int(gridDim.x) + 1);
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

// Of the producer's warpgroup, in another warp than the producer.
constexpr int kSchedulingThread = 32;

// What a warp reads from shared memory, in uniform registers, where reductions of a warp end.
template <class Words>
CUTE_DEVICE Words broadcast(const Words& shared) {
  Words words = shared;
  CUTE_UNROLL
  for (int i = 0; i < int(sizeof(Words) / sizeof(int)); ++i) {
    auto& word = reinterpret_cast<unsigned*>(&words)[i];
    word = __reduce_or_sync(0xffffffff, word);
  }
  return words;
}

// A work tile with its sequence's mask.
struct Work {
  WorkTile tile;
  Mask mask;

  CUTE_DEVICE bool none() const { return tile.block < 0; }
};

// A CTA's work tiles, worked out once by a thread of its own for producer and consumers: divisions
// and clamps that everybody would wait for at the start of every tile. A stage is filled again
// when its tile has been stored, so numbers are taken at most one ahead, and CTAs stay balanced.
//
// range_of(p, work, intervals, i), i < kRanges, is what of the other sequence has to be visited;
// [0] is what the producer loads.
template <int kRanges, class Range = TileRange>
struct WorkQueue {
  static constexpr int kStages = 2;
  using Cursor = RingCursor<kStages>;

  struct Slot {
    Work work;
    Intervals intervals;
    int head_kv;  // the kv head of the tile's query head
    Range ranges[kRanges];
  };
  RingBarriers<kStages> ring;
  Slot slots[kStages];

  // The scheduling thread. With each tile it calls on_tile(tile, ranges[0]), and takes another
  // number when that has returned and a stage is free.
  template <class Params, class RangeOf, class OnTile>
  CUTE_DEVICE void fill(const Params& p, const RangeOf& range_of, const OnTile& on_tile) {
    Cursor cursor;
    for (int index = p.scheduler.first(); index < p.scheduler.num_tiles;
         index = p.scheduler.next(index)) {
      Slot& slot = slots[cursor.stage];
      const WorkTile& tile = slot.work.tile;
      slot.work.tile = p.scheduler.tile(index);
      slot.head_kv = tile.head / p.heads_per_kv_head;
      slot.work.mask = make_mask(p.mask, p.index, tile.batch, p.seqlen_q, p.seqlen_k);
      leave_in_memory();
      read_intervals(slot.intervals, slot.work.mask, p.index, tile.batch, p.query_heads(tile.head),
                     {p.seqlen_q, p.seqlen_k});
      leave_in_memory();
      CUTE_NO_UNROLL
      for (int i = 0; i < kRanges; ++i) slot.ranges[i] = range_of(p, slot.work, slot.intervals, i);
      ring.full[cursor.stage].arrive();
      on_tile(tile, slot.ranges[0]);
      cursor.advance();
      wait_empty(ring, cursor);
    }
    slots[cursor.stage].work.tile.block = -1;
    ring.full[cursor.stage].arrive();
  }
  template <class Params, class RangeOf>
  CUTE_DEVICE void fill(const Params& p, const RangeOf& range_of) {
    fill(p, range_of, [](const WorkTile&, const TileRange&) {});
  }

  // For the producer thread, which gives the stage back at once. False: there are no more.
  struct Load {
    WorkTile tile;
    int head_kv;
    Range range;
  };
  CUTE_DEVICE bool take(Cursor& cursor, Load& load) {
    wait_full(ring, cursor);
    const Slot& slot = slots[cursor.stage];
    if (slot.work.none()) return false;
    load = {slot.work.tile, slot.head_kv, slot.ranges[0]};
    release(ring, cursor);
    cursor.advance();
    return true;
  }
  // The same for a producer that is a warp.
  CUTE_DEVICE bool take_by_warp(Cursor& cursor, Load& load) {
    wait_full(ring, cursor);
    const Slot& slot = slots[cursor.stage];
    if (slot.work.none()) return false;
    load = {slot.work.tile, slot.head_kv, slot.ranges[0]};
    release_by_warp(ring, cursor);
    cursor.advance();
    return true;
  }
  // For whole warps. A stage may be released only behind a barrier of the warpgroup.
  CUTE_DEVICE Work read(Cursor cursor) {
    wait_full(ring, cursor);
    return broadcast(slots[cursor.stage].work);
  }
  CUTE_DEVICE Range range(Cursor cursor, int i) const {
    return broadcast(slots[cursor.stage].ranges[i]);
  }
  // Where they are: a loop that masks nothing has no registers for them.
  CUTE_DEVICE const Intervals& intervals(Cursor cursor) const {
    return slots[cursor.stage].intervals;
  }

 private:
  // What has been written is read again from where it is: the thread has few registers.
  CUTE_DEVICE static void leave_in_memory() { asm volatile("" ::: "memory"); }
};

// range_of of the kernels whose tiles are blocks of queries: [0] is what the block sees of the
// keys, [1 + w] what the rows of warpgroup w do.
template <class T>
CUTE_DEVICE TileRange visible_keys(const typename T::Params& p, const Work& work,
                                   const Intervals& intervals, int i) {
  const int row = work.tile.block * T::kBlockM;
  const int begin = i == 0 ? row : row + (i - 1) * kWarpgroupRows;
  const int end = begin + (i == 0 ? T::kBlockM : kWarpgroupRows);
  const Bounds seen = intervals.of_rows({p.seqlen_q, p.seqlen_k}, begin, end);
  return work.mask.key_tiles(begin, end, T::kBlockN, seen);
}

}  // namespace jax_fa3
