// The two threads of the backward kernel that load, each as far ahead as its rings allow: a tile's
// first loads are under way while the tile before it is stored. They have few registers, and the
// walk of the queries must not spill: behind the additions of dQ even a word from local memory
// takes long.
#pragma once

#include "kernels/backward/traits.cuh"

namespace jax_fa3 {

// Walks the CTA's work tiles and keeps the rings of Q and dO filled for every query block of every
// query head of a group.
template <class T>
CUTE_DEVICE void produce(const typename T::Params& p, typename T::SharedStorage& shared) {
  constexpr int kStatisticsBytes = T::kBlockM * sizeof(RowStatistics);
  typename T::Works::Cursor works_cursor;
  typename T::Cursor cursor;

  for (typename T::Works::Load load; shared.works.take(works_cursor, load);) {
    const auto load_step = [&](const QueryWalk& walk, int bias_bytes) {
      const int batch = load.tile.batch;
      const int head = walk.batch_head - batch * p.num_heads;
      const int row = walk.m * T::kBlockM;
      auto& query_full =
          acquire(shared.query_ring, cursor, T::QTile::kBytes + kStatisticsBytes + bias_bytes);
      load_tile<typename T::QTile>(p.query, query_full, kEvictLast, shared.query[cursor.stage], row,
                                   head, batch);
      load_bytes(p.statistics + p.query_block(walk.batch_head, walk.m) * T::kBlockM, query_full,
                 shared.statistics[cursor.stage], kStatisticsBytes);
      if constexpr (T::kTakesBias) {
        p.dense.template load_bias<typename T::BiasTile>(p.bias, query_full,
                                                         shared.bias[cursor.stage], row,
                                                         load.tile.block * T::kBlockN, head, batch);
      }
      auto& dout_full = acquire(shared.dout_ring, cursor, T::DOTile::kBytes);
      load_tile<typename T::DOTile>(p.dout, dout_full, kEvictLast, shared.dout[cursor.stage], row,
                                    head, batch);
      cursor.advance();
    };
    if (load.range.empty()) {
    } else if constexpr (T::kListed) {
      const int bias_bytes = T::kTakesBias && p.dense.has_bias ? T::BiasTile::kBytes : 0;
      auto& steps = shared.producer_walk;
      steps.begin(p, load.tile, load.range);
      do {
        const Visit visit = steps.look();
        if (visit == Visit::kNone) continue;
        const QueryWalk& walk = steps.walk;
        wait_empty(shared.query_ring, cursor);
        shared.step[cursor.stage] = {walk.batch_head, walk.m, walk.head(), visit == Visit::kCut};
        load_step(walk, bias_bytes);
      } while (steps.walk.next());
    } else {
      QueryWalk walk(p, load.tile, load.range);
      do {
        load_step(walk, 0);
      } while (walk.next());
    }
    shared.demand.full[0].arrive();
  }
}

// Takes the work tiles and loads their K and V. Tiles are few and long, and a number taken at the
// start of the tile before would be as good as dealt out: the next one is taken when all of the
// tile's queries have been loaded.
template <class T>
CUTE_DEVICE void schedule(const typename T::Params& p, typename T::SharedStorage& shared) {
  RingCursor<1> key_value_cursor, demand_cursor;
  const auto range_of = [&](const auto& p, const Work& work, const Intervals& intervals, int i) {
    if constexpr (T::kListed) {
      return listed_queries<T>(p, work, intervals, shared.scheduler_walk);
    } else {
      return visible_queries<T>(p, work, intervals, i);
    }
  };
  shared.works.fill(p, range_of, [&](const WorkTile& tile, const auto& queries) {
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
