// One consumer warpgroup's share of a work tile: 64 query rows against all their keys.
//
//   S(last) = Q K(last)^T;  P = softmax(S)
//   for the tiles before it, right to left:
//     in turn with the other warpgroups: issue S = Q K(n)^T, then O += P V(n+1)
//     while O and the other warpgroups' GEMMs run: mask and exponentiate S
//     when O has arrived: rescale it if a row maximum has outgrown its reference; P = S
//   O += P V(first)
//
// Tiles that straddle an edge of the mask are peeled off at both ends, so that the middle, the
// bulk, runs without a compare.
#pragma once

#include "kernels/forward/traits.cuh"

namespace jax_fa3 {

template <class T>
struct ForwardConsumer {
  using NamedBarrier = cutlass::arch::NamedBarrier;

  const typename T::Params& p;
  typename T::SharedStorage& shared;
  const int warpgroup;  // 0 .. kConsumers - 1

  typename T::QueryCursor query_cursor;
  typename T::Works::Cursor works_cursor;
  typename T::Cursor key_cursor, value_cursor;
  bool output_is_staged = false;

  // What shared memory has to hold before the first load: nothing.
  CUTE_DEVICE static void prepare(typename T::SharedStorage&) {}

  // The CTA's work tiles, one after another.
  CUTE_DEVICE void run() {
    using namespace cute;
    if (warpgroup == T::kConsumers - 1) pass_turn();  // the first turn is warpgroup 0's
    for (Work work; !(work = shared.works.read(works_cursor)).none();) {
      const auto& [tile, mask] = work;
      const int row = tile.block * T::kBlockM + warpgroup * kWarpgroupRows;
      // What the producer loads, and what of it this warpgroup's rows see.
      const TileRange loaded = shared.works.range(works_cursor, 0);
      const TileRange keys = shared.works.range(works_cursor, 1 + warpgroup);

      auto tO = make_accumulator<typename T::MmaO, T::kHeadDimV>();
      clear(tO);
      typename T::Softmax softmax{p.rescale_threshold, p.negative_threshold};
      wait_full(shared.query_ring[warpgroup], query_cursor);
      if (!keys.empty()) {
        skip(loaded.end - keys.end, loaded.end - keys.end);
        attend(tO, softmax, work, keys, row);
        skip(keys.begin - loaded.begin, keys.begin - loaded.begin);
      } else {
        if constexpr (T::kOwnOutput) release(shared.query_ring[warpgroup], query_cursor);
        free_staged_output();
        skip(loaded.end - loaded.begin, loaded.end - loaded.begin - 1);
      }
      finish_tile(tO, softmax, work, row);
    }
    tma_store_wait<0>();  // shared memory must outlive the last store
  }

  // From sums to the tile's outputs, and on to the next tile.
  template <class AccumulatorO>
  CUTE_DEVICE void finish_tile(AccumulatorO& tO, typename T::Softmax& softmax, const Work& work,
                               int row) {
    const auto& [tile, mask] = work;
    const int first_row = row + thread_row();
    const bool exists[2] = {first_row < mask.query_length, first_row + 8 < mask.query_length};
    float lse[2];
    const bool is_valid = intervals().is_valid;
    softmax.settle(scale_log2());
    if (p.max_logits != nullptr) {
      float logits[2];
      softmax.largest_logits(logits, scale_log2());
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (!exists[r]) logits[r] = -INFINITY;
        if (!is_valid) logits[r] = NAN;
      }
      store_rows(p.max_logits, logits, tile, first_row);
    }
    if (!is_valid) softmax.poison();
    const float sink =
        p.sinks.values == nullptr ? -INFINITY : p.sinks.of(tile.batch, tile.head) * kLog2e;
    softmax.finish(tO, exists, sink, lse);
    store_rows(p.lse, lse, tile, first_row);
    store_output(tO, tile, row);
    query_cursor.advance();
    output_is_staged = true;
    if constexpr (T::kQueryStages == 1) free_staged_output();
    // Not before the barriers of store_output: by then every warp has read it.
    release(shared.works.ring, works_cursor);
    works_cursor.advance();
  }

  // O, and the sums and maxima of its rows, by way of the keys that they see.
  template <class AccumulatorO>
  CUTE_DEVICE void attend(AccumulatorO& tO, typename T::Softmax& softmax, const Work& work,
                          const TileRange& keys, int row) {
    using namespace cute;
    const Mask& mask = work.mask;
    const auto tSrQ = queries();
    auto tP = make_operand_a<typename T::Element, T::kBlockN>();
    const float scale_log2 = this->scale_log2();
    const typename T::Score score(p.score, work.tile.batch, work.tile.head);
    const int position = row + mask.first + p.mask.window_left;  // of the first row
    const bool looks_back = p.mask.window_right <= 0;
    const auto apply_score = [&](auto& tS, int n) {
      return score.template apply<Rows::kQueries>(tS, {row, position, n * T::kBlockN, looks_back});
    };

    // The right-most tile: nothing to overlap with yet.
    int n = keys.end - 1;
    {
      auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
      issue_scores(tSrQ, tS);
      free_staged_output();  // not before: nobody needs that stage yet
      wait_mma<0>(tS);
      release(shared.key_ring, key_cursor);
      key_cursor.advance();
      const auto shift = apply_score(tS, n);
      if (keys.cuts(n)) T::Masking::mask_scores(tS, mask, intervals(), row, n * T::kBlockN);
      softmax.begin(tS, scale_log2, shift);  // O is zero: no rescale
      convert(tS, tP);
      clear_value_tail(mask, n);
    }

    const auto step = [&](auto masked) {
      auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
      take_turn();
      issue_scores(tSrQ, tS);
      issue_output(tP, tO);
      pass_turn();
      wait_mma<1>(tS);
      release(shared.key_ring, key_cursor);
      key_cursor.advance();
      const auto shift = apply_score(tS, n);
      if constexpr (decltype(masked)::value) {
        T::Masking::mask_scores(tS, mask, intervals(), row, n * T::kBlockN);
      }
      const bool rescale = softmax.update(tS, scale_log2, shift);
      finish_output(tO);
      convert(tS, tP);
      if (rescale) softmax.rescale(tO);
    };
    --n;
    for (; n >= keys.full_end; --n) step(true_type{});
    for (; n >= keys.full_begin; --n) step(false_type{});
    for (; n >= keys.begin; --n) step(true_type{});

    if constexpr (T::kOwnOutput) release(shared.query_ring[warpgroup], query_cursor);
    issue_output(tP, tO);
    finish_output(tO);
  }

  // From scores to logits of base 2.
  CUTE_DEVICE float scale_log2() const {
    if constexpr (has_function(T::kVariant)) return T::Score::logit_scale_log2(p.score);
    return p.logit_scale_log2;
  }
  // The warpgroup's rows of Q, as an operand.
  CUTE_DEVICE auto queries() const {
    typename T::MmaS mma;
    return operand_a(mma, T::QTile::row_block(shared.query[query_cursor.stage], warpgroup));
  }
  // S = Q K^T of the next stage of keys.
  template <class Queries, class AccumulatorS>
  CUTE_DEVICE void issue_scores(const Queries& tSrQ, AccumulatorS& tS) const {
    typename T::MmaS mma;
    wait_full(shared.key_ring, key_cursor);
    const auto sK = T::KTile::tensor(shared.key[key_cursor.stage]);
    issue_mma<Accumulate::kOverwrite>(mma, tSrQ, operand_b(mma, sK), tS);
  }
  // O += P V with the next stage of values.
  template <class Probabilities, class AccumulatorO>
  CUTE_DEVICE void issue_output(const Probabilities& tP, AccumulatorO& tO) const {
    typename T::MmaO mma;
    wait_full(shared.value_ring, value_cursor);
    const auto sVt = T::VTile::transposed(shared.value[value_cursor.stage]);
    issue_mma<Accumulate::kAdd>(mma, tP, operand_b(mma, sVt), tO);
  }
  template <class AccumulatorO>
  CUTE_DEVICE void finish_output(AccumulatorO& tO) {
    wait_mma<0>(tO);
    release(shared.value_ring, value_cursor);
    value_cursor.advance();
  }

  CUTE_DEVICE const Intervals& intervals() const { return shared.works.intervals(works_cursor); }

  // Ping-pong: the warpgroups issue their GEMMs one after another, so that one's softmax falls
  // under another's GEMMs.
  CUTE_DEVICE void take_turn() const {
    if constexpr (T::kPingPong) NamedBarrier::sync(2 * kWarpgroupThreads, T::kOrder + warpgroup);
  }
  CUTE_DEVICE void pass_turn() const {
    if constexpr (T::kPingPong) {
      NamedBarrier::arrive(2 * kWarpgroupThreads, T::kOrder + (warpgroup + 1) % T::kConsumers);
    }
  }

  // Passes over key tiles that other warpgroups' rows see and none of this one's does. A warpgroup
  // has a turn for each loaded tile but one, whether it uses the tile or not.
  CUTE_DEVICE void skip(int tiles, int turns) {
    for (int i = 0; i < tiles; ++i) {
      if (i < turns) {
        take_turn();
        pass_turn();
      }
      wait_full(shared.key_ring, key_cursor);
      release(shared.key_ring, key_cursor);
      key_cursor.advance();
      wait_full(shared.value_ring, value_cursor);
      release(shared.value_ring, value_cursor);
      value_cursor.advance();
    }
  }

  // V rows past the sequence's keys may hold anything, NaN included, and P = 0 does not stop
  // NaN. Only the right-most tile can have such rows. Every warpgroup clears them for itself,
  // before its own GEMM reads them.
  CUTE_DEVICE void clear_value_tail(const Mask& mask, int n) const {
    const int valid = mask.key_length - n * T::kBlockN;
    if (mask.key_length == p.seqlen_k || valid >= T::kBlockN) return;
    wait_full(shared.value_ring, value_cursor);
    zero_rows_from<typename T::VTile>(shared.value[value_cursor.stage], valid);
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup();
  }

  // Numbers of the thread's two rows to an array of all rows, [b, h_q, s_q].
  CUTE_DEVICE void store_rows(float* all, const float (&numbers)[2], const WorkTile& tile,
                              int first_row) const {
    float* const of_head =
        all + (std::int64_t(tile.batch) * p.scheduler.num_heads + tile.head) * p.seqlen_q;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * r;
      if (threadIdx.x % 4 == 0 && row < p.seqlen_q) of_head[row] = numbers[r];
    }
  }

  // Registers to shared memory to global memory, this warpgroup's 64 rows. One thread stores, and
  // before anyone writes the buffer again the previous store must have read it.
  template <class AccumulatorO>
  CUTE_DEVICE void store_output(const AccumulatorO& tO, const WorkTile& tile, int row) {
    const bool leader = threadIdx.x % kWarpgroupThreads == 0;
    auto* const buffer = shared.output(query_cursor.stage);
    if constexpr (T::kOwnOutput) {
      if (leader) cute::tma_store_wait<0>();
      sync_warpgroup();
    }
    store_accumulator<typename T::OTile>(tO, buffer, warpgroup * kWarpgroupRows);
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup();
    if (leader) {
      if (row < p.seqlen_q) {
        store_tile<typename T::OTile>(p.out, buffer, warpgroup * kWarpgroupRows, row, tile.head,
                                      tile.batch);
      }
      cute::tma_store_arrive();
    }
  }

  // After O has been staged in the Q of the tile before: when the store has read it, that is free.
  CUTE_DEVICE void free_staged_output() {
    if constexpr (T::kOwnOutput) return;
    cute::tma_store_wait<0>();  // of the thread that stores; nothing to wait for in the others
    if (output_is_staged) release(shared.query_ring[warpgroup], query_cursor.before());
    output_is_staged = false;
  }

  CUTE_DEVICE void sync_warpgroup() const {
    NamedBarrier::sync(kWarpgroupThreads, T::kOutput + warpgroup);
  }
};

}  // namespace jax_fa3
