// One consumer warpgroup in float8: the schedule is that of forward/consumer.cuh, and so are
// passed-over tiles. What differs:
//   - a turn ends when the scores have arrived and the first are exponentiated (kScoresOfTurn).
//     GEMMs take half the time of 16 bits, exponentials the same: if one warpgroup's GEMMs were
//     issued right behind another's, both would wait for them and then exponentiate together,
//     with idle tensor cores;
//   - the scale of the logits is a number per key tile: it multiplies the scores in the same FFMA
//     that subtracts the maximum, and the maximum is kept in scaled units;
//   - P is rounded to e4m3 without leaving the thread (attention/prepared_value.h);
//   - O may be summed in two levels (kPromote).
#pragma once

#include <cfloat>

#include "kernels/forward/consumer.cuh"
#include "kernels/forward_float8/traits.cuh"

namespace jax_fa3 {

template <class T>
struct ForwardFloat8Consumer : ForwardConsumer<T> {
  using Base = ForwardConsumer<T>;
  using Base::key_cursor;
  using Base::p;
  using Base::query_cursor;
  using Base::shared;
  using Base::value_cursor;
  using Base::warpgroup;
  using Base::works_cursor;
  static_assert(T::kOwnOutput, "outputs are wider than inputs: O does not fit Q's buffer");

  // Keys past the sequence's end may hold anything, NaN included, and P = 0 does not stop NaN. Only
  // the right-most tile can have such keys. Every warpgroup clears them for itself, before its own
  // GEMM reads them; atomically, for the others do the same and may be reading the rest.
  CUTE_DEVICE void clear_value_tail(const Mask& mask, int n) const {
    const int valid = mask.key_length - n * T::kBlockN;
    if (valid >= T::kBlockN) return;
    wait_full(shared.value_ring, value_cursor);
    const auto sVt = T::VTile::tensor(shared.value[value_cursor.stage]);
    constexpr int kGroups = T::kBlockN / kPreparedGroup;
    CUTE_NO_UNROLL
    for (int i = threadIdx.x % kWarpgroupThreads; i < T::kHeadDimV * kGroups;
         i += kWarpgroupThreads) {
      const int first = i % kGroups * kPreparedGroup;
      if (first + kPreparedGroup <= valid) continue;
      auto* const words = reinterpret_cast<std::uint32_t*>(&sVt(i / kGroups, first));
      CUTE_UNROLL
      for (int w = 0; w < 4; ++w) atomicAnd(words + w, prepared_word_mask(w, valid - first));
    }
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup();
  }

  template <class AccumulatorO>
  CUTE_DEVICE void attend(AccumulatorO& tO, typename T::Softmax& softmax, const WorkTile& tile,
                          const Mask& mask, const TileRange& keys, int row) {
    typename T::MmaS mma_s;
    typename T::MmaO mma_o;
    using namespace cute;
    const auto tSrQ =
        operand_a(mma_s, T::QTile::row_block(shared.query[query_cursor.stage], warpgroup));
    const auto first_key = operand_b(mma_s, T::KTile::tensor(shared.key[0]));
    const auto first_value = operand_b(mma_o, T::VTile::tensor(shared.value[0]));
    auto tP = make_operand_a<typename T::Element, T::kBlockN>();

    // Scales: constant over these rows, one for each key tile.
    const int batch_head = tile.batch * p.scheduler.num_heads + tile.head;
    const int batch_head_kv = batch_head / p.heads_per_kv_head;
    const float* const query_descale =
        p.query_descale + std::int64_t(batch_head) * p.query_descales;
    const float* const key_descale = p.key_descale + std::int64_t(batch_head_kv) * p.key_descales;
    const int key_stride = p.key_descales > 1;
    const float row_scale = p.softmax_scale_log2 *
                            __ldg(query_descale + (p.query_descales > 1 ? row / kDescaleBlock : 0));
    // Positive even where a block of zeros has a scale of zero: -inf * 0 is NaN.
    const auto scale_log2 = [&](int n) {
      const int block = n / (kDescaleBlock / T::kBlockN);
      const float scale = row_scale * __ldg(key_descale + block * key_stride);
      return scale < FLT_MIN ? FLT_MIN : scale;
    };

    // With promotion the tensor cores add to tPartial, and that is added to O after every group of
    // tiles; groups end, going left, at multiples of kPromote.
    AccumulatorO tPartial;
    AccumulatorO& tSum = T::kPromote > 0 ? tPartial : tO;
    if constexpr (T::kPromote > 0) clear(tPartial);
    const auto ends_group = [](int n) { return T::kPromote > 0 && (n & (T::kPromote - 1)) == 0; };
    const auto promote = [&] {
      CUTE_UNROLL
      for (int i = 0; i < size(tO); ++i) tO(i) += tPartial(i);
    };

    const auto issue_scores = [&](auto& tS) {
      wait_full(shared.key_ring, key_cursor);
      const auto tSrK = operand_at(first_key, key_cursor.stage * T::KTile::kBytes);
      issue_mma<Accumulate::kOverwrite>(mma_s, tSrQ, tSrK, tS);
    };
    const auto issue_output = [&](int n) {
      wait_full(shared.value_ring, value_cursor);
      const auto tOrV = operand_at(first_value, value_cursor.stage * T::VTile::kBytes);
      issue_mma<Accumulate::kAdd>(mma_o, tP, tOrV, tSum, !ends_group(n + 1));
    };

    // The right-most tile: nothing to overlap with yet.
    int n = keys.end - 1;
    {
      auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
      const float scale = scale_log2(n);
      issue_scores(tS);
      wait_mma<0>(tS);
      release(shared.key_ring, key_cursor);
      key_cursor.advance();
      if (keys.cuts(n)) T::Masking::mask_scores(tS, mask, row, n * T::kBlockN);
      softmax.begin(tS, scale);  // O is zero: no rescale
      convert_float8(tS, tP);
      clear_value_tail(mask, n);
    }

    const auto step = [&](auto masked) {
      auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
      const float scale = scale_log2(n);
      this->take_turn();
      issue_scores(tS);
      issue_output(n + 1);
      wait_mma<1>(tS);
      release(shared.key_ring, key_cursor);
      key_cursor.advance();
      if constexpr (decltype(masked)::value) T::Masking::mask_scores(tS, mask, row, n * T::kBlockN);
      float found[2];
      softmax.largest(found, tS, scale);
      if constexpr (T::kScoresOfTurn == 0) this->pass_turn();
      const bool rescale = softmax.follow(found, tS, scale);
      if constexpr (T::kScoresOfTurn > 0) {
        softmax.template exponentiate<0, T::kScoresOfTurn>(tS, scale);
        warpgroup_fence_operand(tS);  // no exponential moves past it, in either direction
        this->pass_turn();
        warpgroup_fence_operand(tS);
      }
      softmax.template exponentiate<T::kScoresOfTurn, decltype(size(tS))::value>(tS, scale);
      wait_mma<0>(tSum);
      release(shared.value_ring, value_cursor);
      value_cursor.advance();
      convert_float8(tS, tP);
      if constexpr (T::kPromote > 0) {
        if (ends_group(n + 1)) promote();
        if (rescale) softmax.rescale(tPartial);
      }
      if (rescale) softmax.rescale(tO);
    };
    --n;
    for (; n >= keys.full_end; --n) step(true_type{});
    for (; n >= keys.full_begin; --n) step(false_type{});
    for (; n >= keys.begin; --n) step(true_type{});

    release(shared.query_ring[warpgroup], query_cursor);
    const float value_descale = __ldg(p.value_descale + batch_head_kv);
    issue_output(keys.begin);
    wait_mma<0>(tSum);
    release(shared.value_ring, value_cursor);
    value_cursor.advance();
    if constexpr (T::kPromote > 0) promote();
    CUTE_UNROLL
    for (int i = 0; i < size(tO); ++i) tO(i) *= value_descale;
  }

  // The work tiles one after another, as ForwardConsumer::run.
  CUTE_DEVICE void run() {
    using namespace cute;
    if (warpgroup == T::kConsumers - 1) this->pass_turn();  // the first turn is warpgroup 0's
    for (Work work; !(work = shared.works.read(works_cursor)).none();) {
      const auto& [tile, mask] = work;
      const int row = tile.block * T::kBlockM + warpgroup * kWarpgroupRows;
      const TileRange loaded = shared.works.range(works_cursor, 0);
      const TileRange keys = shared.works.range(works_cursor, 1 + warpgroup);

      auto tO = make_accumulator<typename T::MmaO, T::kHeadDimV>();
      clear(tO);
      typename T::Softmax softmax{T::kThreshold};
      wait_full(shared.query_ring[warpgroup], query_cursor);
      if (!keys.empty()) {
        this->skip(loaded.end - keys.end, loaded.end - keys.end);
        attend(tO, softmax, tile, mask, keys, row);
        this->skip(keys.begin - loaded.begin, keys.begin - loaded.begin);
      } else {
        release(shared.query_ring[warpgroup], query_cursor);
        this->skip(loaded.end - loaded.begin, loaded.end - loaded.begin - 1);
      }
      const int first_row = row + thread_row();
      const bool exists[2] = {first_row < mask.query_length, first_row + 8 < mask.query_length};
      float lse[2];
      softmax.finish(tO, exists, lse);
      this->store_lse(lse, tile, first_row);
      store_output(tO, tile, row);
      query_cursor.advance();
      // Not before the barriers of store_output: by then every warp has read it.
      release(shared.works.ring, works_cursor);
      works_cursor.advance();
    }
    tma_store_wait<0>();  // shared memory must outlive the last store
  }

  // As ForwardConsumer::store_output, rounded to the type that the call asks for.
  template <class AccumulatorO>
  CUTE_DEVICE void store_output(const AccumulatorO& tO, const WorkTile& tile, int row) {
    using namespace cute;
    const bool leader = threadIdx.x % kWarpgroupThreads == 0;
    if (leader) tma_store_wait<0>();
    sync_warpgroup();
    auto rounded = make_tensor_like<std::uint16_t>(tO);
    if (p.out_is_fp16) {
      auto fp16 = recast<cutlass::half_t>(rounded);
      convert(tO, fp16);
    } else {
      auto bf16 = recast<cutlass::bfloat16_t>(rounded);
      convert(tO, bf16);
    }
    store_rounded<typename T::OTile>(rounded, shared.own_output, warpgroup * kWarpgroupRows);
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup();
    if (leader) {
      if (row < p.seqlen_q) {
        store_tile<typename T::OTile>(p.out, shared.own_output, warpgroup * kWarpgroupRows, row,
                                      tile.head, tile.batch);
      }
      tma_store_arrive();
    }
  }

  CUTE_DEVICE void sync_warpgroup() const {
    Base::NamedBarrier::sync(kWarpgroupThreads, T::kOutput + warpgroup);
  }
};

}  // namespace jax_fa3
