// The dQ kernel's producer: one thread that walks the CTA's work tiles and keeps the rings filled.
#pragma once

#include "kernels/backward_dq/traits.cuh"

namespace jax_fa3 {

template <class T>
CUTE_DEVICE void produce_for_dquery(const DQueryParams& p, typename T::SharedStorage& shared) {
  RingCursor<1> query_cursor;
  typename T::Works::Cursor works_cursor;
  RingCursor<T::kKeyStages> key_cursor;
  RingCursor<T::kValueStages> value_cursor;

  for (typename T::Works::Load load; shared.works.take(works_cursor, load);) {
    const WorkTile tile = load.tile;
    const int head_kv = load.head_kv;
    const TileRange keys = load.range;
    const int row = tile.block * T::kBlockM;

    const auto load_queries = [&] {
      CUTE_NO_UNROLL
      for (int w = 0; w < T::kConsumers; ++w) {
        auto& full = acquire(shared.query_ring[w], query_cursor,
                             (T::QTile::kBytes + T::DOTile::kBytes) / T::kConsumers);
        load_rows<typename T::QTile>(p.query, full, kEvictFirst, shared.query, w * kWarpgroupRows,
                                     row + w * kWarpgroupRows, tile.head, tile.batch);
        load_rows<typename T::DOTile>(p.dout, full, kEvictFirst, shared.dout, w * kWarpgroupRows,
                                      row + w * kWarpgroupRows, tile.head, tile.batch);
      }
      query_cursor.advance();
    };
    if (keys.empty()) load_queries();  // nobody reads them, but the rings stay in step
    CUTE_NO_UNROLL
    for (int n = keys.end - 1; n >= keys.begin; --n) {
      auto& key_full = acquire(shared.key_ring, key_cursor, T::KTile::kBytes);
      T::Source::load_key(p, key_full, shared.key[key_cursor.stage], n * T::kBlockN, head_kv,
                          tile.batch);
      key_cursor.advance();
      if (n == keys.end - 1) load_queries();  // after the first K, which does not wait for them
      auto& value_full = acquire(shared.value_ring, value_cursor, T::VTile::kBytes);
      T::Source::load_value(p, value_full, shared.value[value_cursor.stage], n * T::kBlockN,
                            head_kv, tile.batch);
      value_cursor.advance();
    }
  }
}

}  // namespace jax_fa3
