// The backward producer: one thread that loads a key block's K and V, then keeps the rings of
// (Q, LSE) and (dO, delta) filled for every query block of every query head of the group.
#pragma once

#include "attention/mask.h"
#include "backward/traits.cuh"

namespace jax_fa3 {

template <class T>
CUTE_DEVICE void produce(const BackwardParams& p, typename T::SharedStorage& shared,
                         const WorkTile& tile, const TileRange& queries) {
  if (queries.empty()) return;
  shared.key_value_full.arrive_and_expect_tx(T::KTile::kBytes + T::VTile::kBytes);
  const int key_row = tile.block * T::kBlockN;
  load_tile<typename T::KTile>(p.key, shared.key_value_full, kEvictFirst, shared.key, key_row,
                               tile.head, tile.batch);
  load_tile<typename T::VTile>(p.value, shared.key_value_full, kEvictFirst, shared.value, key_row,
                               tile.head, tile.batch);

  constexpr int kStatisticsBytes = T::kBlockM * sizeof(float);
  typename T::Cursor cursor;
  for (QueryWalk walk(p, tile, queries); walk.more(); walk.next()) {
    const std::int64_t statistics = walk.block() * T::kBlockM;
    auto& query_full = acquire(shared.query_ring, cursor, T::QTile::kBytes + kStatisticsBytes);
    load_tile<typename T::QTile>(p.query, query_full, kEvictLast, shared.query[cursor.stage],
                                 walk.m * T::kBlockM, walk.head, tile.batch);
    load_bytes(p.lse_log2 + statistics, query_full, shared.lse_log2[cursor.stage],
               kStatisticsBytes);
    auto& dout_full = acquire(shared.dout_ring, cursor, T::DOTile::kBytes + kStatisticsBytes);
    load_tile<typename T::DOTile>(p.dout, dout_full, kEvictLast, shared.dout[cursor.stage],
                                  walk.m * T::kBlockM, walk.head, tile.batch);
    load_bytes(p.delta + statistics, dout_full, shared.delta[cursor.stage], kStatisticsBytes);
    cursor.advance();
  }
}

}  // namespace jax_fa3
