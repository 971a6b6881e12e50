// The warps of the dBias kernel that do not compute: one finds the steps of the CTA's work that
// have anything to add, and one thread of another loads what they need.
#pragma once

#include "kernels/backward_dbias/traits.cuh"

namespace jax_fa3 {

// Of the producer's warpgroup, another one than the producer's.
constexpr int kSchedulingWarp = 1;

// What of step `index` of an item's tile is to be visited: rows innermost, then heads, then
// sequences. Fills in the step, but for its kind.
template <class T>
CUTE_DEVICE Visit look_at_step(const DBiasParams& p, int item, int index, BiasStep& step) {
  const BiasWork& work = p.work;
  step.item = item;
  step.tile = work.tile(item, T::kBlockN);
  const BiasBlock& tile = step.tile;
  const int head_index = index / work.shared_row_blocks;
  step.batch = tile.plane * work.shared_sequences + head_index / work.shared_heads;
  step.head = tile.head + head_index % work.shared_heads;
  step.head_kv = step.head / p.heads_per_kv_head;
  step.row = tile.row + index % work.shared_row_blocks * T::kBlockM;

  step.mask = make_mask(p.mask, p.index, step.batch, p.seqlen_q, p.seqlen_k);
  const PlaneLayout layout{p.seqlen_q, p.seqlen_k};
  Intervals intervals;
  read_intervals(intervals, step.mask, p.index, step.batch, {step.head, 1}, layout);
  step.plane = intervals.plane;
  const int row_end = step.row + T::kBlockM;
  const Bounds seen = intervals.of_rows(layout, step.row, row_end);
  const TileRange keys = step.mask.key_tiles(step.row, row_end, T::kBlockN, seen);
  const int n = tile.key / T::kBlockN;
  if (n < keys.begin || n >= keys.end) return Visit::kNone;
  const Visit visit =
      visit_of<T::kBlockM, T::kBlockN>(p.dense.mask_of(step.batch, step.head), keys, step.row, n);
  // The block in which a sequence ends counts as cut: the rows behind may hold anything.
  return visit == Visit::kFull && row_end > step.mask.query_length ? Visit::kCut : visit;
}

// The scheduling warp. Each lane looks at a step of its own, of this item or of one of the next:
// they all wait for memory together, and steps that add nothing, most of them under some masks,
// cost little. What it saw a lane looks up again when it is its turn to tell: registers are few.
template <class T>
CUTE_DEVICE void schedule_for_dbias(const DBiasParams& p, typename T::SharedStorage& shared) {
  const BiasWork& work = p.work;
  const int lane = threadIdx.x % 32;
  RingCursor<T::kSteps> cursor;
  // One lane after another: two that waited for a stage at a time would take its phases for one.
  const auto tell = [&](bool my_turn, const auto& fill) {
    if (my_turn) {
      wait_empty(shared.step_ring, cursor);
      fill(shared.steps[cursor.stage]);
      shared.step_ring.full[cursor.stage].arrive();
    }
    __syncwarp();
    cursor.advance();
  };

  int round = 0, index = lane;  // of the CTA's items, and of the item's steps
  while (true) {
    round += index / work.slice_steps;
    index %= work.slice_steps;
    const int item = number_in_round(round);
    const bool exists = item < work.num_items();
    if (!__any_sync(0xffffffff, exists)) break;

    const int of_tile = item / work.num_tiles * work.slice_steps + index;
    BiasStep seen;
    const Visit visit =
        exists && of_tile < work.num_steps ? look_at_step<T>(p, item, of_tile, seen) : Visit::kNone;
    const auto visits = __ballot_sync(0xffffffff, visit != Visit::kNone);
    const auto ends = __ballot_sync(0xffffffff, exists && index == work.slice_steps - 1);
    CUTE_NO_UNROLL
    for (auto left = visits | ends; left != 0; left &= left - 1) {
      const int from = __ffs(left) - 1;
      if (visits >> from & 1) {
        tell(lane == from, [&](BiasStep& step) {
          look_at_step<T>(p, item, of_tile, step);
          step.kind = visit == Visit::kFull ? BiasStep::kFull : BiasStep::kCut;
        });
      }
      if (ends >> from & 1) {
        tell(lane == from, [&](BiasStep& step) {
          step.kind = BiasStep::kEnd;
          step.item = item;
          step.tile = work.tile(item, T::kBlockN);
        });
      }
    }
    index += 32;
  }
  tell(lane == 0, [](BiasStep& step) { step.kind = BiasStep::kStop; });
}

// The producer thread, which keeps the rings filled, across work tiles too.
template <class T>
CUTE_DEVICE void produce_for_dbias(const DBiasParams& p, typename T::SharedStorage& shared) {
  RingCursor<T::kSteps> step_cursor;
  RingCursor<T::kStages> cursor;
  RingCursor<T::kBiasStages> bias_cursor;
  bool has_bias = false;  // the item at hand

  const auto load_bias = [&](const BiasStep& step) {
    auto& full = acquire(shared.bias_ring, bias_cursor, T::BiasTile::kBytes);
    // Rows that are the same are those of the first block, which has no fewer than any other.
    load_plane<typename T::BiasTile>(p.bias, full, kEvictFirst, shared.bias[bias_cursor.stage],
                                     step.tile.row, step.tile.key, step.tile.head, step.tile.plane);
  };
  while (true) {
    wait_full(shared.step_ring, step_cursor);
    const BiasStep& step = shared.steps[step_cursor.stage];
    if (step.kind == BiasStep::kStop) return;
    if (step.kind == BiasStep::kEnd) {
      if (!has_bias) {  // nobody reads it, but its place is where dBias goes out
        wait_empty(shared.bias_ring, bias_cursor);
        shared.bias_ring.full[bias_cursor.stage].arrive();
      }
      bias_cursor.advance();
      has_bias = false;
    } else {
      auto& query_full = acquire(shared.query_ring, cursor, T::kQueryBytes);
      load_tile<typename T::QTile>(p.query, query_full, kEvictLast, shared.query[cursor.stage],
                                   step.row, step.head, step.batch);
      T::Source::load_key(p, query_full, shared.key[cursor.stage], step.tile.key, step.head_kv,
                          step.batch);
      if (!has_bias) load_bias(step);  // after the first Q and K, which do not wait for it
      has_bias = true;

      const int statistics_bytes =
          min(T::kBlockM, p.statistics_rows - step.row) * int(sizeof(RowStatistics));
      auto& dout_full = acquire(shared.dout_ring, cursor, T::kDOutBytes + statistics_bytes);
      load_tile<typename T::DOTile>(p.dout, dout_full, kEvictLast, shared.dout[cursor.stage],
                                    step.row, step.head, step.batch);
      T::Source::load_value(p, dout_full, shared.value[cursor.stage], step.tile.key, step.head_kv,
                            step.batch);
      const std::int64_t head = std::int64_t{step.batch} * p.num_heads + step.head;
      load_bytes(p.statistics + head * p.statistics_rows + step.row, dout_full,
                 shared.statistics[cursor.stage], statistics_bytes);
      cursor.advance();
    }
    shared.step_ring.empty[step_cursor.stage].arrive();
    step_cursor.advance();
  }
}

}  // namespace jax_fa3
