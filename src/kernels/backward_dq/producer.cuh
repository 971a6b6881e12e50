// The dQ kernel's producer, which walks the CTA's work tiles and keeps the rings filled: one
// thread, or of a list a warp, whose first lane loads.
#pragma once

#include "kernels/backward_dq/traits.cuh"

namespace jax_fa3 {

// What has been taken, where there is room for it: a warp that walks a list has few registers.
template <class T>
CUTE_DEVICE const auto& taken(typename T::SharedStorage& shared,
                              const typename T::Works::Load& load) {
  if constexpr (T::kListed) {
    if (threadIdx.x == 0) shared.load = load;
    __syncwarp();
    return shared.load;
  } else {
    return load;
  }
}

template <class T>
CUTE_DEVICE void produce_for_dquery(const typename T::Params& p,
                                    typename T::SharedStorage& shared) {
  RingCursor<1> query_cursor;
  typename T::Works::Cursor works_cursor;
  RingCursor<T::kKeyStages> key_cursor;
  RingCursor<T::kValueStages> value_cursor;

  const auto take = [&](typename T::Works::Load& load) {
    return T::kListed ? shared.works.take_by_warp(works_cursor, load)
                      : shared.works.take(works_cursor, load);
  };
  for (typename T::Works::Load load; take(load);) {
    const auto& taken_load = taken<T>(shared, load);
    const WorkTile& tile = taken_load.tile;
    const int& head_kv = taken_load.head_kv;
    const TileRange& range = taken_load.range;
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
    const auto load_keys = [&](int n, bool is_first) {
      int value_bytes = T::VTile::kBytes;
      if constexpr (T::kListed) {
        wait_empty(shared.key_ring, key_cursor);
        shared.key_tile[key_cursor.stage] = n;
        if constexpr (T::kTakesBias) value_bytes += p.dense.bias_bytes;
      }
      auto& key_full = acquire(shared.key_ring, key_cursor, T::KTile::kBytes);
      T::Source::load_key(p, key_full, shared.key[key_cursor.stage], n * T::kBlockN, head_kv,
                          tile.batch);
      key_cursor.advance();
      if (is_first) load_queries();  // after the first K, which does not wait for them
      auto& value_full = acquire(shared.value_ring, value_cursor, value_bytes);
      T::Source::load_value(p, value_full, shared.value[value_cursor.stage], n * T::kBlockN,
                            head_kv, tile.batch);
      if constexpr (T::kTakesBias) {
        p.dense.template load_bias<typename T::BiasTile>(p.bias, value_full,
                                                         shared.bias[value_cursor.stage], row,
                                                         n * T::kBlockN, tile.head, tile.batch);
      }
      value_cursor.advance();
    };
    // Without keys nobody reads the queries, but the rings stay in step.
    if constexpr (T::kListed) {
      const bool loads = threadIdx.x == 0;
      if (loads) shared.tiles = {p.dense.mask_of(tile.batch, tile.head), range, row};
      __syncwarp();
      KeyWalk walk(shared.tiles);
      const TileCounts counts = walk.count();
      if (loads) {
        for (int w = 0; w < T::kConsumers; ++w) wait_empty(shared.query_ring[w], query_cursor);
        shared.counts = counts;
        if (counts.empty()) load_queries();
      }
      for (bool is_first = true; walk.next(); is_first = false) {
        if (loads) load_keys(walk.n, is_first);
      }
    } else {
      const TileRange keys = range;
      if (keys.empty()) load_queries();
      CUTE_NO_UNROLL
      for (int n = keys.end - 1; n >= keys.begin; --n) load_keys(n, n == keys.end - 1);
    }
  }
}

}  // namespace jax_fa3
