// The two threads of the backward kernel that load, of which one may be a warp, each as far ahead
// as its rings allow: a tile's first loads are under way while the tile before it is stored. They
// have few registers, and the walk of the queries must not spill: behind the additions of dQ even a
// word from local memory takes long.
#pragma once

#include "kernels/backward/traits.cuh"

namespace jax_fa3 {

// Loads the queries of a step of work tile `tile`.
template <class T>
CUTE_DEVICE void load_step(const typename T::Params& p, typename T::SharedStorage& shared,
                           const typename T::Cursor& cursor, const WorkTile& tile, int batch_head,
                           int m) {
  constexpr int kStatisticsBytes = T::kBlockM * sizeof(RowStatistics);
  const int head = batch_head - tile.batch * p.num_heads;
  const int row = m * T::kBlockM;
  int query_bytes = T::QTile::kBytes + kStatisticsBytes;
  if constexpr (T::kTakesBias) query_bytes += p.dense.bias_bytes;
  auto& query_full = acquire(shared.query_ring, cursor, query_bytes);
  load_tile<typename T::QTile>(p.query, query_full, kEvictLast, shared.query[cursor.stage], row,
                               head, tile.batch);
  load_bytes(p.statistics + p.query_block(batch_head, m) * T::kBlockM, query_full,
             shared.statistics[cursor.stage], kStatisticsBytes);
  if constexpr (T::kTakesBias) {
    p.dense.template load_bias<typename T::BiasTile>(p.bias, query_full, shared.bias[cursor.stage],
                                                     row, tile.block * T::kBlockN, head,
                                                     tile.batch);
  }
  auto& dout_full = acquire(shared.dout_ring, cursor, T::DOTile::kBytes);
  load_tile<typename T::DOTile>(p.dout, dout_full, kEvictLast, shared.dout[cursor.stage], row, head,
                                tile.batch);
}

// Walks the CTA's work tiles and keeps the rings of Q and dO filled for every query block of every
// query head of a group.
template <class T>
CUTE_DEVICE void produce(const typename T::Params& p, typename T::SharedStorage& shared) {
  typename T::Works::Cursor works_cursor;
  typename T::Cursor cursor;

  for (typename T::Works::Load load; shared.works.take(works_cursor, load);) {
    if (!load.range.empty()) {
      QueryWalk walk(p, load.tile, load.range);
      do {
        load_step<T>(p, shared, cursor, load.tile, walk.batch_head, walk.m);
        cursor.advance();
      } while (walk.next());
    }
    shared.demand.full[0].arrive();
  }
}

// As produce, with the steps of a list. A warp walks it, and its first lane loads.
template <class T>
CUTE_DEVICE void produce_listed(const typename T::Params& p, typename T::SharedStorage& shared) {
  const bool loads = threadIdx.x == 0;
  const auto& steps = shared.steps;
  typename T::Works::Cursor works_cursor;
  typename T::Cursor cursor;

  for (typename T::Works::Load load; shared.works.take_by_warp(works_cursor, load);) {
    if (!load.range.empty()) {
      if (loads) shared.steps.begin(p, load.tile, load.range);
      __syncwarp();
      ListWalk walk(steps);
      bool more = walk.next();
      if (!more) {
        if (loads) {
          wait_empty(shared.query_ring, cursor);
          shared.step[cursor.stage].is_none = true;
          shared.query_ring.full[cursor.stage].arrive();
          wait_empty(shared.dout_ring, cursor);
          shared.dout_ring.full[cursor.stage].arrive();
        }
        cursor.advance();
      }
      while (more) {
        const int entry = walk.entry;
        const bool is_cut = walk.is_cut;
        more = walk.next();
        if (loads) {
          const int head = steps.head(entry), m = steps.m(entry);
          wait_empty(shared.query_ring, cursor);
          shared.step[cursor.stage] = {steps.first_head + head, m, head, is_cut, !more, false};
          load_step<T>(p, shared, cursor, steps.tile, steps.first_head + head, m);
        }
        cursor.advance();
      }
      __syncwarp();  // before the list changes
    }
    if (loads) shared.demand.full[0].arrive();
  }
}

// Takes the work tiles and loads their K and V. Tiles are few and long, and a number taken at the
// start of the tile before would be as good as dealt out: the next one is taken when all of the
// tile's queries have been loaded.
template <class T>
CUTE_DEVICE void schedule(const typename T::Params& p, typename T::SharedStorage& shared) {
  RingCursor<1> key_value_cursor, demand_cursor;
  shared.works.fill(p, visible_queries<T>, [&](const WorkTile& tile, const auto& queries) {
    if (!queries.empty()) {
      // Only this tile reads them, and there is room for them when the tile before is done: then
      // everybody waits.
      const int row = tile.block * T::kBlockN;
      prefetch_tile<typename T::KTile>(p.key, row, tile.head, tile.batch);
      prefetch_tile<typename T::VTile>(p.value, row, tile.head, tile.batch);
      auto& full =
          acquire(shared.key_value_ring, key_value_cursor, T::KTile::kBytes + T::VTile::kBytes);
      load_tile<typename T::KTile>(p.key, full, kEvictFirst, shared.key, row, tile.head,
                                   tile.batch);
      load_tile<typename T::VTile>(p.value, full, kEvictFirst, shared.value, row, tile.head,
                                   tile.batch);
      key_value_cursor.advance();
    }
    wait_full(shared.demand, demand_cursor);
    demand_cursor.advance();
  });
}

}  // namespace jax_fa3
