// The producing warp of many rows: tiles of K and V, right to left in the order of their use.
#pragma once

#include "kernels/forward_cached/rows_traits.cuh"

namespace jax_fa3 {

template <class T>
struct CachedRowsProducer {
  const ForwardCachedParams& p;
  typename T::SharedStorage& shared;

  CUTE_DEVICE void run() {
    PieceQueue& queue = shared.rest.pieces;
    PieceQueue::Cursor piece_cursor;
    typename T::Cursor key_cursor, value_cursor;
    for (;; piece_cursor.advance()) {
      wait_full(queue.ring, piece_cursor);
      const Piece& piece = queue.pieces[piece_cursor.stage];
      if (piece.none()) return;
      const int head = piece.head;
      const Range tiles = piece.tiles;
      typename T::Source source(p, piece.batch, piece.keys.any, tiles.end - 1);
      release_by_warp(queue.ring, piece_cursor);

      // A K tile is needed one step ahead of its V tile.
      Slot place{}, place_before{};
      CUTE_NO_UNROLL
      for (int n = tiles.end - 1; n >= tiles.begin - 1; --n) {
        place_before = place;
        if (n >= tiles.begin) {
          place = source.next();
          auto& full = acquire_by_warp(shared.key_ring, key_cursor, T::KTile::kBytes);
          source.load_key(p, full, shared.key[key_cursor.stage], head, place);
          key_cursor.advance();
        }
        if (n < tiles.end - 1) {
          auto& full = acquire_by_warp(shared.value_ring, value_cursor, T::VTile::kBytes);
          source.load_value(p, full, shared.value[value_cursor.stage], head, place_before);
          value_cursor.advance();
        }
      }
    }
  }
};

}  // namespace jax_fa3
