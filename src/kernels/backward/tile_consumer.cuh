// What the consumer warpgroups of the main kernel have in common, whatever they make of a step:
// their way from work tile to work tile, and that of dK and dV to global memory.
#pragma once

#include "kernels/backward/traits.cuh"

namespace jax_fa3 {

template <class T>
struct TileConsumer {
  using Element = typename T::Element;
  using NamedBarrier = cutlass::arch::NamedBarrier;

  const typename T::Params& p;
  typename T::SharedStorage& shared;
  const int warpgroup;  // 0 or 1

  typename T::Works::Cursor works_cursor{};
  RingCursor<1> key_value_cursor{};
  typename T::Cursor cursor{};

  TileRange queries;  // that see the tile at hand

  CUTE_DEVICE void sync_warpgroup() const {
    NamedBarrier::sync(kWarpgroupThreads, T::kWarpgroup + warpgroup);
  }

  // False: there are no more tiles.
  CUTE_DEVICE bool next_tile() {
    wait_full(shared.works.ring, works_cursor);
    queries = shared.works.range(works_cursor, 0);
    return !work().none();
  }
  // The tile at hand. It stays in shared memory: the steps' registers are scarce.
  CUTE_DEVICE const Work& work() const { return shared.works.slots[works_cursor.stage].work; }
  CUTE_DEVICE const Intervals& intervals() const { return shared.works.intervals(works_cursor); }
  // On return K and V have arrived. Not called where no query sees the tile.
  CUTE_DEVICE void await_keys() const { wait_full(shared.key_value_ring, key_value_cursor); }
  // This warpgroup's GEMMs that read them are done.
  CUTE_DEVICE void release_keys() {
    release(shared.key_value_ring, key_value_cursor);
    key_value_cursor.advance();
  }
  // Behind a barrier of the warpgroup: by then every warp has read the tile.
  CUTE_DEVICE void end_tile() {
    release(shared.works.ring, works_cursor);
    works_cursor.advance();
  }

  // Rows past a sequence's length may hold anything, NaN included, and a probability of zero does
  // not stop NaN: they are cleared before a GEMM reads them, by every warpgroup for itself. Where
  // both read them, both write the same zeros.
  template <class Tile>
  CUTE_DEVICE void clear_tail(Element* keys) const {
    const auto& [tile, mask] = work();
    const int valid = max(mask.key_length - tile.block * T::kBlockN, 0);
    if (mask.key_length == p.seqlen_k || valid >= T::kBlockN) return;
    zero_rows_from<Tile>(keys, valid);
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup();
  }
  CUTE_DEVICE void clear_query_tail(int m) const {
    const Mask& mask = work().mask;
    const int valid = mask.query_length - m * T::kBlockM;
    if (mask.query_length == p.seqlen_q || valid >= T::kBlockM) return;
    wait_full(shared.dout_ring, cursor);
    zero_rows_from<typename T::QTile>(shared.query[cursor.stage], valid);
    zero_rows_from<typename T::DOTile>(shared.dout[cursor.stage], valid);
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup();
  }

  // The steps of the tile at hand, which has one at least: a walk, or those of a list, for which
  // step(listed) is called when their queries have arrived. A list may turn out to be empty: then
  // its only stage has no queries, and release() gives it back.
  template <class Step, class Release>
  CUTE_DEVICE void for_each_listed_step(const Step& step, const Release& release) {
    bool is_last;
    do {
      wait_full(shared.query_ring, cursor);
      const ListedStep listed = shared.step[cursor.stage];  // it changes when the stage is free
      is_last = listed.is_last || listed.is_none;
      if (listed.is_none) {
        wait_full(shared.dout_ring, cursor);
        release();
        cursor.advance();
      } else {
        step(listed);
      }
    } while (!is_last);
  }
  CUTE_DEVICE QueryWalk walk() const { return QueryWalk(p, work().tile, queries); }
  template <class Step, class Release>
  CUTE_DEVICE void for_each_step(const Step& step, const Release& release) {
    if constexpr (T::kListed) {
      for_each_listed_step(step, release);
    } else {
      QueryWalk walk = this->walk();
      do {
        step(walk);
      } while (walk.next());
    }
  }

  // What a dense mask says of a step's queries and the tile's keys from `key` on, for
  // finish_scores.
  static constexpr bool kHasBlocks = T::kVariant == Variant::kBlocks;
  using Bits = cute::conditional_t<kHasBlocks, TileClass, MaskBits<T::kBlockM>>;
  template <class Walk>
  CUTE_DEVICE Bits mask_bits(const Walk& walk, int key, bool cut) const {
    if constexpr (T::kListed) {
      if (cut && p.dense.has_mask) {
        const WorkTile& tile = work().tile;
        const int head = tile.head * p.heads_per_kv_head + walk.head();
        const DenseMask mask = p.dense.mask_of(tile.batch, head);
        const int first_row = walk.m * T::kBlockM, first_key = tile.block * T::kBlockN;
        if constexpr (kHasBlocks) {
          return mask.classify(first_row, T::kBlockM, first_key, T::kBlockN);
        } else {
          return Bits::of_keys(mask, first_row, first_key + key);
        }
      }
    }
    return {};
  }

  template <class Walk>
  CUTE_DEVICE typename T::Score score_of(const Walk& walk) const {
    const WorkTile& tile = work().tile;
    return {p.score, tile.batch, tile.head * p.heads_per_kv_head + walk.head()};
  }

  // From products to scores, which a mask makes -inf: the tile's keys from `key` on.
  template <class Walk, class Accumulator>
  CUTE_DEVICE void finish_scores(Accumulator& tSt, const Walk& walk, int key, bool cut,
                                 const Bits& bits) const {
    const int first_row = walk.m * T::kBlockM, first_key = work().tile.block * T::kBlockN + key;
    const int position = first_row + work().mask.first + p.mask.window_left;
    const Corner corner{first_row, position, first_key};
    if constexpr (kHasBlocks) {
      score_of(walk).template apply<Rows::kKeys>(tSt, corner, /*asks=*/!bits.all);
    } else {
      score_of(walk).template apply<Rows::kKeys>(tSt, corner);
    }
    if constexpr (T::kTakesBias) {
      if (p.dense.has_bias) {
        add_bias_transposed<typename T::BiasTile>(tSt, shared.bias[cursor.stage], key,
                                                  p.dense.bias_factor, p.dense.bias_row_mask);
      }
    }
    if (cut) {
      T::Masking::mask_scores_transposed(tSt, work().mask, intervals(), first_row, first_key,
                                         walk.head());
      if constexpr (T::kListed && !kHasBlocks) {
        if (p.dense.has_mask) bits.apply(tSt);
      }
    }
  }

  // From scores to what dP^T is multiplied with to make dS^T. That is P^T, of scores less the LSE,
  // where scores are linear; else the LSE is subtracted here, and P^T is what `tP` becomes. Of the
  // tile's keys from `key` on.
  template <class Walk, class Accumulator, class Operand>
  CUTE_DEVICE void exponentiate(Accumulator& tSt, Operand& tP, const Walk& walk, int key) const {
    if constexpr (T::Score::kIsLinear) {
      CUTE_UNROLL
      for (int i = 0; i < cute::size(tSt); ++i) {
        const float log2 = tSt(i) * p.logit_scale_log2;
        tSt(i) = exp2_approx(T::kTakesBias ? bounded_exponent(log2) : log2);
      }
    } else {
      const auto score = score_of(walk);
      const int first_row = walk.m * T::kBlockM;
      const int first_key = work().tile.block * T::kBlockN + key + thread_row();
      // A column's two rows together, and pairs of columns, which are a register of P.
      CUTE_UNROLL
      for (int i = 0; i < cute::size(tSt); i += 4) {
        float weights[4];
        CUTE_UNROLL
        for (int c = 0; c < 2; ++c) {
          const int row = thread_col() + accumulator_col(i + c);
          const float negative_lse =
              shared.statistics[cursor.stage][row].template lse<false>() * p.logit_scale_log2;
          CUTE_UNROLL
          for (int r = 0; r < 2; ++r) {
            const Weight weight = score.weigh(tSt(i + c + 2 * r), p.logit_scale_log2, negative_lse,
                                              first_row + row, first_key + 8 * r);
            tSt(i + c + 2 * r) = weight.slope;
            weights[c + 2 * r] = weight.p;
          }
        }
        CUTE_UNROLL
        for (int j = 0; j < 4; ++j) tP(i + j) = Element(weights[j]);
      }
    }
  }

  // Issues C = left right^T - the queries' statistic: S^T or dP^T of 64 keys against the stage's
  // queries. The LSE is not subtracted from what a score is yet to be made of.
  template <Statistic kStatistic, class Left, class Right, class Accumulator>
  CUTE_DEVICE void issue_scores(const Left& left, const Right& right, Accumulator& tC) const {
    typename T::MmaS mma;
    if constexpr (kStatistic == Statistic::kLse && !T::Score::kIsLinear) {
      issue_mma<Accumulate::kOverwrite>(mma, operand_a(mma, left), operand_b(mma, right), tC);
    } else {
      typename T::Statistics::Mma mma_statistic;
      issue_mma(mma, operand_a(mma, left), operand_b(mma, right), mma_statistic,
                operand_a(mma_statistic, shared.constants[int(kStatistic)].tensor()),
                operand_b(mma_statistic, T::Statistics::tensor(shared.statistics[cursor.stage])),
                tC);
    }
  }

  // kCols columns of 64 rows of the tile, from `row`: registers to shared memory to global memory,
  // as many at a time as Tile has. Where the warpgroup has two buffers, it takes them by turns, and
  // a buffer is waited for before it is written; where it has one, on return the leader knows that
  // it has been read.
  template <class Tile, int kCols, class Accumulator>
  CUTE_DEVICE void store_output(const Accumulator& tC, const CUtensorMap& map, int row,
                                Element* buffer) const {
    const WorkTile& tile = work().tile;
    const int first_row = tile.block * T::kBlockN + row;
    CUTE_UNROLL
    for (int col = 0; col < kCols; col += Tile::kCols) {
      constexpr int kThreadsPerRow = kWarpgroupThreads / kWarpgroupRows;
      const auto tPiece =
          cute::make_tensor(tC.data() + col / kThreadsPerRow,
                            cute::make_layout(cute::Int<Tile::kCols / kThreadsPerRow>{}));
      if constexpr (T::kSplitKeys) {
        if (leads_warpgroup()) cute::tma_store_wait<T::kOutputBuffers - 1>();
      }
      sync_warpgroup();
      store_accumulator<Tile>(tPiece, buffer, 0);
      cutlass::arch::fence_view_async_shared();
      sync_warpgroup();
      if (leads_warpgroup()) {
        if (first_row < p.seqlen_k) {
          store_tile<Tile>(map, buffer, 0, first_row, tile.head, tile.batch, col);
        }
        cute::tma_store_arrive();
        if constexpr (!T::kSplitKeys) cute::tma_store_wait<0>();
      }
    }
  }
  template <class AccumulatorDK>
  CUTE_DEVICE void scale_dkey(AccumulatorDK& tDK) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tDK); ++i) tDK(i) = finite_or_nan(tDK(i)) * p.softmax_scale;
  }
};

}  // namespace jax_fa3
