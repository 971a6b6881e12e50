// The backward producer: one thread that walks the CTA's work tiles and keeps the rings of Q and dO
// filled for every query block of every query head of a group, K and V for each tile. It runs
// ahead: a tile's first loads are under way while the tile before it is stored.
#pragma once

#include "backward/traits.cuh"

namespace jax_fa3 {

template <class T>
CUTE_DEVICE void produce(const BackwardParams& p, typename T::SharedStorage& shared) {
  constexpr int kStatisticsBytes = T::kBlockM * sizeof(RowStatistics);
  typename T::Works::Cursor works_cursor;
  RingCursor<1> key_value_cursor;
  typename T::Cursor cursor;

  for (typename T::Works::Load load; shared.works.take(works_cursor, load);) {
    const WorkTile tile = load.tile;
    const int key_row = tile.block * T::kBlockN;
    bool first = true;
    for (QueryWalk walk(p, tile, load.range); walk.more(); walk.next()) {
      auto& query_full = acquire(shared.query_ring, cursor, T::QTile::kBytes + kStatisticsBytes);
      load_tile<typename T::QTile>(p.query, query_full, kEvictLast, shared.query[cursor.stage],
                                   walk.m * T::kBlockM, walk.head, tile.batch);
      load_bytes(p.statistics + walk.block() * T::kBlockM, query_full,
                 shared.statistics[cursor.stage], kStatisticsBytes);
      if (first) {  // after the first Q, whose buffer is free earlier
        auto& full =
            acquire(shared.key_value_ring, key_value_cursor, T::KTile::kBytes + T::VTile::kBytes);
        load_tile<typename T::KTile>(p.key, full, kEvictFirst, shared.key, key_row, tile.head,
                                     tile.batch);
        load_tile<typename T::VTile>(p.value, full, kEvictFirst, shared.value, key_row, tile.head,
                                     tile.batch);
        key_value_cursor.advance();
        first = false;
      }
      auto& dout_full = acquire(shared.dout_ring, cursor, T::DOTile::kBytes);
      load_tile<typename T::DOTile>(p.dout, dout_full, kEvictLast, shared.dout[cursor.stage],
                                    walk.m * T::kBlockM, walk.head, tile.batch);
      cursor.advance();
    }
    shared.demand.full[0].arrive();
  }
}

}  // namespace jax_fa3
