// The forward producer: one thread that walks the CTA's work tiles and keeps the Q, K and V rings
// filled. It runs ahead of the consumers across tiles, so the next tile's loads are under way
// during the epilogue.
#pragma once

#include "kernels/forward/traits.cuh"

namespace jax_fa3 {

// Each warpgroup's rows by themselves: they load as soon as it is done with its last ones, while
// the others still finish.
template <class T>
CUTE_DEVICE void load_queries(const typename T::Params& p, typename T::SharedStorage& shared,
                              typename T::QueryCursor& cursor, const WorkTile& tile) {
  CUTE_NO_UNROLL
  for (int w = 0; w < T::kConsumers; ++w) {
    auto& full = acquire(shared.query_ring[w], cursor, T::QTile::kBytes / T::kConsumers);
    load_rows<typename T::QTile>(p.query, full, kEvictFirst, shared.query[cursor.stage],
                                 w * kWarpgroupRows, tile.block * T::kBlockM + w * kWarpgroupRows,
                                 tile.head, tile.batch);
  }
  cursor.advance();
}

template <class T>
CUTE_DEVICE void produce(const typename T::Params& p, typename T::SharedStorage& shared) {
  typename T::QueryCursor query_cursor;
  typename T::Works::Cursor works_cursor;
  typename T::Cursor key_cursor, value_cursor;

  for (typename T::Works::Load load; shared.works.take(works_cursor, load);) {
    const WorkTile tile = load.tile;
    const int head_kv = load.head_kv;
    const TileRange keys = load.range;

    // Right to left, in the order of use: a K tile is needed one step ahead of its V tile. One
    // place for each load, or the addresses of all copies would not fit the producer's registers.
    CUTE_NO_UNROLL
    for (int n = keys.end - 1; n >= keys.begin - 1; --n) {
      if (n >= keys.begin) {
        auto& full = acquire(shared.key_ring, key_cursor, T::KTile::kBytes);
        T::Source::load_key(p, full, shared.key[key_cursor.stage], n * T::kBlockN, head_kv,
                            tile.batch);
        key_cursor.advance();
      }
      // After the first K, which does not wait for them.
      if (n == keys.end - 1) load_queries<T>(p, shared, query_cursor, tile);
      if (n < keys.end - 1) {
        auto& full = acquire(shared.value_ring, value_cursor, T::VTile::kBytes);
        T::Source::load_value(p, full, shared.value[value_cursor.stage], (n + 1) * T::kBlockN,
                              head_kv, tile.batch);
        value_cursor.advance();
      }
    }
  }
}

}  // namespace jax_fa3
