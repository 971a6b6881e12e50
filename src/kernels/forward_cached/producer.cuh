// The producing warp: tiles of K and V, box by box, a lane for each box. It runs ahead of the
// consumers, across pieces.
#pragma once

#include "kernels/forward_cached/traits.cuh"

namespace jax_fa3 {

template <class T>
struct CachedProducer {
  using KTile = typename T::KTile;
  using VTile = typename T::VTile;

  const ForwardCachedParams& p;
  typename T::SharedStorage& shared;

  CUTE_DEVICE void run() {
    PieceQueue& queue = shared.rest.pieces;
    PieceQueue::Cursor piece_cursor;
    typename T::Cursor cursor;
    const int lane = threadIdx.x % 32;
    const int box_bits = __ffs(T::kTileKeys) - __ffs(p.box_rows);
    const int boxes = 1 << box_bits;  // of a tile
    const int box = lane & (boxes - 1), chunk = lane >> box_bits;
    const int tiles_looked_up = 32 >> box_bits;  // at a time
    for (;; piece_cursor.advance()) {
      wait_full(queue.ring, piece_cursor);
      const Piece& slot = queue.pieces[piece_cursor.stage];
      if (slot.none()) return;
      const int batch = slot.batch, head = slot.head;
      const Range tiles = slot.tiles, seen = slot.keys.any;
      release_by_warp(queue.ring, piece_cursor);

      // Where the boxes of tiles to come are, a box a lane: those at hand and those after them.
      const auto look_up = [&](int tile) {
        const int key = tile * T::kTileKeys + lane * p.box_rows;
        return p.pages.find(batch, key, p.box_rows, seen);
      };
      Slot found{}, next = look_up(tiles.begin);
      CUTE_NO_UNROLL
      for (int tile = tiles.begin; tile < tiles.end; ++tile, cursor.advance()) {
        const int ahead = (tile - tiles.begin) & (tiles_looked_up - 1);
        if (ahead == 0) found = next;
        const int page = __shfl_sync(0xffffffff, found.page, ahead * boxes + box);
        const int first = __shfl_sync(0xffffffff, found.slot, ahead * boxes + box);
        load<KTile>(p.key, shared.key_ring, cursor, shared.key[cursor.stage], box, chunk, first,
                    head, page);
        load<VTile>(p.value, shared.value_ring, cursor, shared.value[cursor.stage], box, chunk,
                    first, head, page);
        if (ahead == 0) next = look_up(tile + tiles_looked_up);
      }
    }
  }

 private:
  template <class Tile>
  CUTE_DEVICE void load(const CUtensorMap& map, typename T::Ring& ring,
                        const typename T::Cursor& cursor, typename T::Element* smem, int box,
                        int chunk, int slot, int head, int page) const {
    wait_empty(ring, cursor);
    auto& full = ring.full[cursor.stage];
    if (threadIdx.x % 32 == 0) full.arrive_and_expect_tx(Tile::kBytes);
    __syncwarp();
    if (chunk < Tile::kChunks) {
      load_chunk<Tile>(map, full, kEvictFirst, smem, box * p.box_rows, chunk, slot, head, page);
    }
  }
};

}  // namespace jax_fa3
