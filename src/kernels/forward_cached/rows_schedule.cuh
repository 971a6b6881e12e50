// The scheduling warp of many rows: from the lengths on the device to this CTA's pieces. An item
// takes as many units of the line as its own rows see tiles, so a lane works out an item; the warp
// walks all of them for the total, and again for its group's share of it, unless there are no more
// than 32. The line has them once for each round of kv heads.
#pragma once

#include "kernels/forward_cached/rows_traits.cuh"
#include "kernels/forward_cached/schedule.cuh"

namespace jax_fa3 {

// 32 items at a time, in order.
template <class T, class Units>
struct ItemWalk {
  const CachedExtents& extents;
  SequenceReader sequences;  // 32 at a time
  int first_batch = 0;       // of these
  int blocks = 0;            // of this lane's sequence
  int blocks_end = 0;        // of those of the lanes up to this one
  int next = 0;              // the number of the next item among those of the 32 sequences
  int count = 0;             // of these
  Units base = 0;            // units before the next item

  // This lane's item.
  CachedSequence sequence;
  int batch;
  int block;
  int units;     // 0 behind the last item
  Units begins;  // where its units do

  CUTE_DEVICE ItemWalk(const CachedIndex& index, const CachedExtents& extents)
      : extents(extents), sequences(index, extents) {}

  CUTE_DEVICE void restart() {
    sequences.restart();
    next = count = 0;
    base = 0;
  }

  CUTE_DEVICE Piece item(int head) const {
    return whole_item(extents, sequence, batch, head, block, T::kTileKeys);
  }

  // Reads the next 32; false: there are none, and those read last are still here.
  CUTE_DEVICE bool read() {
    while (next >= count) {
      if (sequences.done()) return false;
      read_sequences();
    }
    const int number = next + int(threadIdx.x) % 32;
    // The lane of its sequence: as many lanes as have only items before it.
    int lane = 0;
    if (extents.batch > 1) {
      CUTE_UNROLL
      for (int step = 16; step > 0; step /= 2) {
        if (__shfl_sync(kAllLanes, blocks_end, lane + step - 1) <= number) lane += step;
      }
    }
    sequence = shuffled(sequences.sequence, lane);
    batch = first_batch + lane;
    block = number - __shfl_sync(kAllLanes, blocks_end - blocks, lane);
    units = number < count ? item(0).tiles.size() + T::kUnitsBeside : 0;
    const int end = scan_warp(units, 32, [](int x, int y) { return x + y; });
    begins = base + (end - units);
    base += __shfl_sync(kAllLanes, end, 31);
    next += 32;
    return true;
  }

 private:
  CUTE_DEVICE void read_sequences() {
    sequences.read();
    first_batch = sequences.first_batch;
    blocks = extents.blocks(sequences.rows);
    blocks_end = scan_warp(blocks, 32, [](int x, int y) { return x + y; });
    count = __shfl_sync(kAllLanes, blocks_end, 31);
    next = 0;
    sequences.advance();
  }
  CUTE_DEVICE static CachedSequence shuffled(CachedSequence sequence, int lane) {
    int* const words = reinterpret_cast<int*>(&sequence);
    CUTE_UNROLL
    for (int i = 0; i < int(sizeof(sequence) / sizeof(int)); ++i) {
      words[i] = __shfl_sync(kAllLanes, words[i], lane);
    }
    return sequence;
  }
};

template <class T, class Units>
struct ItemScheduler : PieceGiver {
  ItemWalk<T, Units> walk;
  bool has_items;  // any
  bool is_short;   // all of them are what one reading gives
  Units total;     // units of a round
  int rows_end;

  CUTE_DEVICE ItemScheduler(const ForwardCachedParams& p, PieceQueue& queue)
      : PieceGiver(p, queue), walk(p.index, p.extents) {}

  // What needs no barrier of the queue.
  CUTE_DEVICE void read() {
    has_items = walk.read();
    is_short = T::kSchedulesEarly;
    CUTE_NO_UNROLL
    while (walk.read()) is_short = false;
    total = walk.base;
    rows_end = walk.sequences.rows_end;
  }

  CUTE_DEVICE void run() {
    const Shares<Units> shares(total * p.rounds, p.groups, T::kMostLeastPart, T::kUnitsBeside);
    const int group = int(blockIdx.x) / p.heads_at_once;
    if (group < shares.groups && has_items) {
      int head = int(blockIdx.x) % p.heads_at_once;
      if (is_one_each(shares)) {
        give_item(shares, group, head);
      } else {
        CUTE_NO_UNROLL
        for (int round = 0; round < p.rounds; ++round, head += p.heads_at_once) {
          give_share(shares, shares.begin(group), shares.begin(group + 1), round * total, head);
        }
      }
    }
    if (threadIdx.x % 32 == 0) give_end();
    if (p.index.query_starts != nullptr) clear_unowned(rows_end);
  }

 private:
  // Whether group i has item i, which is this warp's lane i's, and nothing else.
  CUTE_DEVICE bool is_one_each(const Shares<Units>& shares) const {
    if (!is_short || p.rounds != 1) return false;
    const int items = __popc(__ballot_sync(kAllLanes, walk.units > 0));
    return shares.are_one_each(items, __reduce_max_sync(kAllLanes, walk.units));
  }
  CUTE_DEVICE void give_item(const Shares<Units>& shares, int group, int head) {
    const bool is_mine = int(threadIdx.x) % 32 == group && walk.units > 0;
    if (is_mine) {
      const Piece piece = walk.item(head);
      give(piece, shares, {0, piece.tiles.size(), {0, piece.tiles.size()}});
    }
    const unsigned gives = __ballot_sync(kAllLanes, is_mine);
    if (gives != 0) share_cursor(__ffs(gives) - 1);
  }

  // What a share [from, to) has of the items of a head, which begin at `base`.
  CUTE_DEVICE void give_share(const Shares<Units>& shares, Units from, Units to, Units base,
                              int head) {
    if (base >= to || base + total <= from) return;
    if (!is_short) {
      walk.restart();
      walk.read();
    }
    CUTE_NO_UNROLL
    do {
      const Units begins = base + walk.begins;
      const bool has_some = walk.units > 0 && begins < to && begins + walk.units > from;
      unsigned left = __ballot_sync(kAllLanes, has_some);
      CUTE_NO_UNROLL
      for (; left != 0; left &= left - 1) {
        const int lane = __ffs(left) - 1;
        if (int(threadIdx.x) % 32 == lane) {
          Piece piece = walk.item(head);
          Portion<Units> portion;
          if (take_part(piece, portion, shares, begins, from, to)) give(piece, shares, portion);
        }
        share_cursor(lane);
      }
    } while (!is_short && base + walk.base < to && walk.read());
  }
};

}  // namespace jax_fa3
