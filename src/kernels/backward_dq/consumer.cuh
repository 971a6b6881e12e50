// One consumer warpgroup of the dQ kernel.
//
//   for each key tile, right to left:
//     issue S = Q K^T, dP = dO V^T
//     free the K of the tile before, whose dQ has been made meanwhile
//     P = exp2(scale S - LSE);  dS = P (dP - delta)
//     issue dQ += dS K
#pragma once

#include "kernels/backward_dq/traits.cuh"

namespace jax_fa3 {

// One consumer warpgroup: 64 query rows of each work tile.
template <class T>
struct DQueryConsumer {
  using NamedBarrier = cutlass::arch::NamedBarrier;
  static constexpr bool kHasBlocks = T::kVariant == Variant::kBlocks;

  const typename T::Params& p;
  typename T::SharedStorage& shared;
  const int warpgroup;

  RingCursor<1> query_cursor;
  typename T::Works::Cursor works_cursor;
  RingCursor<T::kKeyStages> key_cursor;   // whose S comes next
  RingCursor<T::kKeyStages> used_cursor;  // whose dQ has been issued last
  RingCursor<T::kValueStages> value_cursor;

  // The CTA's work tiles, one after another.
  CUTE_DEVICE void run() {
    using namespace cute;
    for (Work work; !(work = shared.works.read(works_cursor)).none();) {
      const auto& [tile, mask] = work;
      const int row = tile.block * T::kBlockM + warpgroup * kWarpgroupRows;
      bool active[2];  // rows that exist and see a key
      float negative_lse_log2[2], negative_delta[2];
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int my_row = row + thread_row() + 8 * r;
        active[r] = false;
        negative_lse_log2[r] = negative_delta[r] = 0.f;
        if (my_row >= mask.query_length) continue;
        const std::int64_t head = std::int64_t(tile.batch) * p.scheduler.num_heads + tile.head;
        const RowStatistics statistics = p.statistics[head * p.statistics_rows + my_row];
        const float negative_lse = statistics.lse<T::Score::kIsLinear>();
        active[r] = !(negative_lse <= 0.5f * RowStatistics::kNoGradient);
        negative_lse_log2[r] = negative_lse * p.logit_scale_log2;
        negative_delta[r] = RowStatistics::sum(statistics.negative_delta);
      }

      auto tDQ = make_accumulator<typename T::MmaDQ, T::kHeadDim>();
      clear(tDQ);
      wait_full(shared.query_ring[warpgroup], query_cursor);
      const auto attend = [&](const auto& keys) {
        this->attend(tDQ, work, keys, row, negative_lse_log2, negative_delta);
      };
      if constexpr (T::kListed) {
        const TileCounts keys = broadcast(shared.counts);
        if (!keys.empty()) attend(keys);
      } else {
        // What the producer loads, and what of it this warpgroup's rows see.
        const TileRange loaded = shared.works.range(works_cursor, 0);
        const TileRange keys = shared.works.range(works_cursor, 1 + warpgroup);
        if (keys.empty()) {
          skip(loaded.end - loaded.begin);
        } else {
          skip(loaded.end - keys.end);
          attend(keys);
          skip(keys.begin - loaded.begin);
        }
      }
      CUTE_UNROLL
      for (int i = 0; i < size(tDQ); ++i) {
        tDQ(i) = active[accumulator_row(i)] ? finite_or_nan(tDQ(i)) * p.softmax_scale : 0.f;
      }
      store_output(tDQ, tile, row);
      release(shared.query_ring[warpgroup], query_cursor);
      query_cursor.advance();
      // Not before the barrier of store_output: by then every warp has read it.
      release(shared.works.ring, works_cursor);
      works_cursor.advance();
    }
  }

  // Adds the gradient by way of the keys that this warpgroup's rows see.
  template <class AccumulatorDQ, class Keys>
  CUTE_DEVICE void attend(AccumulatorDQ& tDQ, const Work& work, const Keys& keys, int row,
                          const float (&negative_lse_log2)[2], const float (&negative_delta)[2]) {
    using namespace cute;
    typename T::MmaS mma_s;
    typename T::MmaDQ mma_dq;
    const auto tSrQ = operand_a(mma_s, T::QTile::row_block(shared.query, warpgroup));
    const auto tDPrDO = operand_a(mma_s, T::DOTile::row_block(shared.dout, warpgroup));
    auto tDS = make_operand_a<typename T::Element, T::kBlockN>();
    const typename T::Score score(p.score, work.tile.batch, work.tile.head);
    const int position = row + work.mask.first + p.mask.window_left;  // of the first row

    const auto step = [&](int n, bool is_cut, bool is_first) {
      auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
      auto tDP = make_accumulator<typename T::MmaS, T::kBlockN>();
      const auto key = key_cursor.stage;
      wait_full(shared.key_ring, key_cursor);
      issue_mma<Accumulate::kOverwrite>(mma_s, tSrQ,
                                        operand_b(mma_s, T::KTile::tensor(shared.key[key])), tS);
      key_cursor.advance();
      wait_full(shared.value_ring, value_cursor);
      issue_mma<Accumulate::kOverwrite>(
          mma_s, tDPrDO, operand_b(mma_s, T::VTile::tensor(shared.value[value_cursor.stage])), tDP);

      wait_mma<2>(tDQ);
      if (!is_first) release_key();
      wait_mma<1>(tS);
      const Corner corner{row, position, n * T::kBlockN};
      if constexpr (kHasBlocks) {
        const DenseMask mask = p.dense.mask_of(work.tile.batch, work.tile.head);
        const TileClass seen =
            mask.classify(work.tile.block * T::kBlockM, T::kBlockM, n * T::kBlockN, T::kBlockN);
        score.template apply<Rows::kQueries>(tS, corner, /*asks=*/!seen.all);
      } else {
        score.template apply<Rows::kQueries>(tS, corner);
      }
      if constexpr (T::kTakesBias) {
        if (p.dense.has_bias) {
          add_bias<typename T::BiasTile>(tS, shared.bias[value_cursor.stage],
                                         warpgroup * kWarpgroupRows, p.dense.bias_factor,
                                         p.dense.bias_row_mask);
        }
      }
      // A vote, because dP is in flight: only a branch known to be uniform leaves it alone.
      if (__any_sync(0xffffffff, is_cut)) {
        T::Masking::mask_scores(tS, work.mask, shared.works.intervals(works_cursor), row,
                                n * T::kBlockN);
        if constexpr (T::kListed && !kHasBlocks) {
          if (p.dense.has_mask) {
            using Bits = MaskBits<T::kBlockN>;
            const DenseMask mask = p.dense.mask_of(work.tile.batch, work.tile.head);
            Bits::of_rows(mask, row, n * T::kBlockN).apply(tS);
          }
        }
      }
      CUTE_UNROLL
      for (int i = 0; i < size(tS); ++i) {
        const int r = accumulator_row(i);
        if constexpr (T::Score::kIsLinear) {
          const float log2 = fmaf(tS(i), p.logit_scale_log2, negative_lse_log2[r]);
          tS(i) = exp2_approx(T::kListed ? bounded_exponent(log2) : log2);
        } else {
          const int key = n * T::kBlockN + thread_col() + accumulator_col(i);
          tS(i) = score
                      .weigh(tS(i), p.logit_scale_log2, negative_lse_log2[r],
                             row + thread_row() + 8 * r, key)
                      .slope;
        }
      }
      wait_mma<0>(tDP);
      release_value();
      CUTE_UNROLL
      for (int i = 0; i < size(tDP); ++i) {
        tDP(i) = tS(i) * (tDP(i) + negative_delta[accumulator_row(i)]);
      }
      convert(tDP, tDS);
      issue_mma<Accumulate::kAdd>(mma_dq, tDS,
                                  operand_b(mma_dq, T::KTile::transposed(shared.key[key])), tDQ);
    };
    if constexpr (T::kListed) {
      CUTE_NO_UNROLL
      for (int i = 0; i < keys.cut + keys.full; ++i) {
        wait_full(shared.key_ring, key_cursor);
        const int n = shared.key_tile[key_cursor.stage];
        if (i == 0) clear_key_tail(work.mask, n);  // the right-most tile, if it has rows to clear
        step(n, i < keys.cut, i == 0);
      }
    } else {
      clear_key_tail(work.mask, keys.end - 1);
      CUTE_NO_UNROLL
      for (int n = keys.end - 1; n >= keys.begin; --n) step(n, keys.cuts(n), n == keys.end - 1);
    }
    wait_mma<0>(tDQ);
    release_key();
  }

  CUTE_DEVICE void release_key() {
    release(shared.key_ring, used_cursor);
    used_cursor.advance();
  }
  CUTE_DEVICE void release_value() {
    if constexpr (T::kListed) {
      release_by_warp(shared.value_ring, value_cursor);
    } else {
      release(shared.value_ring, value_cursor);
    }
    value_cursor.advance();
  }
  // Passes over key tiles that the other warpgroup's rows see and none of this one's does.
  CUTE_DEVICE void skip(int tiles) {
    for (int i = 0; i < tiles; ++i) {
      wait_full(shared.key_ring, key_cursor);
      key_cursor.advance();
      release_key();
      wait_full(shared.value_ring, value_cursor);
      release_value();
    }
  }

  // Rows past the sequence's keys may hold anything, NaN included, and P = 0 does not stop NaN.
  // Only the right-most tile can have such rows. Each warpgroup clears for itself.
  CUTE_DEVICE void clear_key_tail(const Mask& mask, int n) const {
    const int valid = mask.key_length - n * T::kBlockN;
    if (mask.key_length == p.seqlen_k || valid >= T::kBlockN) return;
    wait_full(shared.key_ring, key_cursor);
    wait_full(shared.value_ring, value_cursor);
    zero_rows_from<typename T::KTile>(shared.key[key_cursor.stage], valid);
    zero_rows_from<typename T::VTile>(shared.value[value_cursor.stage], valid);
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup();
  }

  // Registers to shared memory, where Q was, to global memory: this warpgroup's 64 rows. On return
  // its leader knows that the buffer has been read.
  template <class AccumulatorDQ>
  CUTE_DEVICE void store_output(const AccumulatorDQ& tDQ, const WorkTile& tile, int row) const {
    store_accumulator<typename T::QTile>(tDQ, shared.query, warpgroup * kWarpgroupRows);
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup();
    if (threadIdx.x % kWarpgroupThreads == 0) {
      if (row < p.seqlen_q) {
        store_tile<typename T::QTile>(p.dquery, shared.query, warpgroup * kWarpgroupRows, row,
                                      tile.head, tile.batch);
      }
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();
    }
  }

  CUTE_DEVICE void sync_warpgroup() const { NamedBarrier::sync(kWarpgroupThreads, 1 + warpgroup); }
};

}  // namespace jax_fa3
