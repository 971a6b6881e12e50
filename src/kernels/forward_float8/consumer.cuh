// One consumer warpgroup in float8: 64 query rows against their keys, tile by tile, right to left.
//
//   S = Q K(n)^T
//   P = e4m3(2^(scaled S - reference)), which never leaves the thread (attention/prepared_value.h)
//   sums = P V(n), by the tensor cores;  O += sums, by the vector units
//
// Two levels, because the tensor cores add 8-bit products to an accumulator of about 14 bits: what
// a long sum adds late is lost. Up to head_dim_v 128 registers hold the sums of a group of tiles
// beside S, and P V of one tile runs under the exponentials of the next, in turns with the other
// warpgroup. Elsewhere S and the sums of one tile use the same registers one after the other, and
// the warpgroups overlap each other.
//
// V^T has eight more rows, of ones. Their column of O is the sum of P as it was rounded, from the
// same products as the output: divided by it, weights add up to 1 whatever rounding did to them.
// The LSE has the sum of P before it is rounded.
//
// A turn ends when the scores have arrived and the first are exponentiated (kScoresOfTurn). GEMMs
// take half the time of 16 bits, exponentials the same: if one warpgroup's GEMMs were issued right
// behind another's, both would wait for them and then exponentiate together, with idle tensor
// cores. The scale of the logits is a number per key tile: it multiplies the scores in the FFMA
// that subtracts the reference, which is kept in scaled units.
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

  // The rows of ones, which TMA never writes.
  CUTE_DEVICE static void prepare(typename T::SharedStorage& shared) {
    constexpr int kWords = T::kSumRows * T::kBlockN / 4;
    constexpr std::uint32_t kOnes = 0x38383838;  // four times 1 in e4m3
    for (int stage = 0; stage < T::kStages; ++stage) {
      auto* const ones =
          reinterpret_cast<std::uint32_t*>(shared.value[stage] + T::VTile::kElements);
      for (int i = threadIdx.x; i < kWords; i += T::kThreads) ones[i] = kOnes;
    }
    cutlass::arch::fence_view_async_shared();
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

      auto tO = make_tensor<float>(Int<T::kHeadDimV / 2 + 2>{});  // and the sums of P
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
      finish(tO, softmax, tile, mask, row);
      query_cursor.advance();
      // Not before the barriers of store_output: by then every warp has read it.
      release(shared.works.ring, works_cursor);
      works_cursor.advance();
    }
    tma_store_wait<0>();  // shared memory must outlive the last store
  }

  template <class AccumulatorO>
  CUTE_DEVICE void attend(AccumulatorO& tO, typename T::Softmax& softmax, const WorkTile& tile,
                          const Mask& mask, const TileRange& keys, int row) {
    using namespace cute;
    typename T::MmaS mma_s;
    const auto tSrQ =
        operand_a(mma_s, T::QTile::row_block(shared.query[query_cursor.stage], warpgroup));
    const auto first_key = operand_b(mma_s, T::KTile::tensor(shared.key[0]));
    auto tP = make_operand_a<typename T::Element, T::kBlockN>();

    // Scales: constant over these rows, one for each key tile.
    const int batch_head = tile.batch * p.scheduler.num_heads + tile.head;
    const int batch_head_kv = batch_head / p.heads_per_kv_head;
    const float* const query_descale =
        p.query_descale + std::int64_t(batch_head) * p.query_descales;
    const float* const key_descale = p.key_descale + std::int64_t(batch_head_kv) * p.key_descales;
    const int key_stride = p.key_descales > 1;
    const float row_scale = p.logit_scale_log2 *
                            __ldg(query_descale + (p.query_descales > 1 ? row / kDescaleBlock : 0));
    // Positive even where a block of zeros has a scale of zero: -inf * 0 is NaN.
    const auto scale_log2 = [&](int n) {
      const int block = n / (kDescaleBlock / T::kBlockN);
      const float scale = row_scale * __ldg(key_descale + block * key_stride);
      return scale < FLT_MIN ? FLT_MIN : scale;
    };

    const auto issue_scores = [&](auto& tS) {
      wait_full(shared.key_ring, key_cursor);
      const auto tSrK = operand_at(first_key, key_cursor.stage * T::KTile::kBytes);
      issue_mma<Accumulate::kOverwrite>(mma_s, tSrQ, tSrK, tS);
    };
    const auto free_key = [&] {
      release(shared.key_ring, key_cursor);
      key_cursor.advance();
    };
    const auto free_value = [&] {
      release(shared.value_ring, value_cursor);
      value_cursor.advance();
    };
    // P of tile n in place of its scores; returns whether the reference moved.
    const auto make_weights = [&](auto& tS, int n, float scale, auto masked) {
      constexpr bool kMasked = decltype(masked)::value;
      constexpr int kScores = decltype(size(tS))::value;
      if constexpr (T::kFindsMaxima) free_key();
      if constexpr (kMasked)
        T::Masking::mask_scores(tS, mask, this->intervals(), row, n * T::kBlockN);
      bool moved;
      if constexpr (kMasked || T::kFindsMaxima) {
        float found[2];
        softmax.largest(found, tS);
        if constexpr (T::kScoresOfTurn == 0) this->pass_turn();
        moved = softmax.may_move(found, scale) && softmax.follow(found, tS, scale);
        if constexpr (T::kScoresOfTurn > 0) {
          softmax.template exponentiate<0, T::kScoresOfTurn>(tS, scale);
          warpgroup_fence_operand(tS);  // no exponential moves past it, in either direction
          this->pass_turn();
          warpgroup_fence_operand(tS);
        }
        softmax.template exponentiate<T::kScoresOfTurn, kScores>(tS, scale);
      } else {
        moved = softmax.exponentiate_first(tS, scale, [&](auto& tS) { recompute_scores(tS); });
      }
      if constexpr (!T::kFindsMaxima) free_key();  // which may have made scores once more
      return moved;
    };
    // Tiles from full_begin to `inner` are cut by no mask, and every row has seen a key before
    // them: of the rows the first sees the fewest keys on the right, unless they have intervals.
    const int edge = keys.full_end * T::kBlockN;
    const bool all_have_seen =
        this->intervals().plane == nullptr && row + mask.last >= edge && mask.key_length > edge;
    const int inner =
        T::kFindsMaxima || all_have_seen ? keys.full_end : max(keys.full_end - 1, keys.begin);

    int n = keys.end - 1;
    const auto visit = [&](const auto& step) {
      for (; n >= inner; --n) step(true_type{});
      for (; n >= keys.full_begin; --n) step(false_type{});
      for (; n >= keys.begin; --n) step(true_type{});
    };
    if constexpr (T::kOverlap) {
      typename T::MmaO mma_o;
      auto tSum = make_accumulator<typename T::MmaO, T::kOutputColumns>();
      clear(tSum);
      const auto first_value = operand_b(mma_o, T::SummedTile::tensor(shared.value[0]));
      // Groups end, going left, at tiles whose number is a multiple of kTilesOfSum.
      const auto ends_group = [](int n) { return n % T::kTilesOfSum == 0; };
      const auto issue_output = [&](int n) {
        wait_full(shared.value_ring, value_cursor);
        const auto tOrV = operand_at(first_value, value_cursor.stage * T::kValueElements);
        issue_mma<Accumulate::kAdd>(mma_o, tP, tOrV, tSum, !ends_group(n + 1));
      };
      // The right-most tile: nothing to overlap with yet.
      {
        auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
        const float scale = scale_log2(n);
        issue_scores(tS);
        wait_mma<0>(tS);
        free_key();
        if (keys.cuts(n)) T::Masking::mask_scores(tS, mask, this->intervals(), row, n * T::kBlockN);
        softmax.begin(tS, scale);  // O is zero: no rescale
        convert_float8(tS, tP);
        wait_full(shared.value_ring, value_cursor);
        clear_value_tail(mask, n);
        --n;
      }
      visit([&](auto masked) {
        auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
        const float scale = scale_log2(n);
        this->take_turn();
        issue_scores(tS);
        issue_output(n + 1);
        wait_mma<1>(tS);
        const bool moved = make_weights(tS, n, scale, masked);
        wait_mma<0>(tSum);
        free_value();
        convert_float8(tS, tP);
        if (ends_group(n + 1)) add_sums(tO, tSum);
        if (moved) {
          softmax.rescale(tSum);
          rescale_output(tO, softmax);
        }
      });
      release(shared.query_ring[warpgroup], query_cursor);
      issue_output(keys.begin);
      wait_mma<0>(tSum);
      free_value();
      add_sums(tO, tSum);
    } else {
      visit([&](auto masked) {
        {
          auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
          const float scale = scale_log2(n);
          issue_scores(tS);
          wait_mma<0>(tS);
          if (make_weights(tS, n, scale, masked)) rescale_output(tO, softmax);
          convert_float8(tS, tP);
        }
        wait_full(shared.value_ring, value_cursor);
        if constexpr (decltype(masked)::value) clear_value_tail(mask, n);
        add_products<0>(tO, tP);
        free_value();
      });
      release(shared.query_ring[warpgroup], query_cursor);
    }
  }

  // O += P V of one tile, part after part of O's columns.
  template <int kPart, class AccumulatorO, class OperandP>
  CUTE_DEVICE void add_products(AccumulatorO& tO, const OperandP& tP) const {
    if constexpr (kPart < T::kParts) {
      constexpr int kColumns = T::template kColumnsOfPart<kPart>;
      using Mma = MmaRS<typename T::Element, kColumns, Major::K>;
      using Tile = SmemTile<typename T::Element, kColumns, T::kBlockN>;
      auto* const rows =
          shared.value[value_cursor.stage] + kPart * T::kPartColumns * Tile::kChunkCols;
      auto tSum = make_accumulator<Mma, kColumns>();
      issue_mma<Accumulate::kOverwrite>(Mma{}, tP, operand_b(Mma{}, Tile::tensor(rows)), tSum);
      wait_mma<0>(tSum);
      add_sums<kPart * T::kPartColumns>(tO, tSum);
      add_products<kPart + 1>(tO, tP);
    }
  }

  // O += sums of its columns from kFirst on. The columns of the weights' sums are alike: O has one.
  template <int kFirst = 0, class AccumulatorO, class Sums>
  CUTE_DEVICE static void add_sums(AccumulatorO& tO, const Sums& tSum) {
    constexpr int kSums = decltype(cute::size(tSum))::value;
    constexpr int kValues = cute::min(kSums, (T::kHeadDimV - kFirst) / 2);
    CUTE_UNROLL
    for (int i = 0; i < kValues; ++i) tO(kFirst / 2 + i) += tSum(i);
    if constexpr (kSums > kValues) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) tO(T::kHeadDimV / 2 + r) += tSum(kValues + 2 * r);
    }
    if constexpr (T::kParts > 1) {  // done before the next part is issued, which takes its place
      CUTE_UNROLL
      for (int i = 0; i < kValues; ++i) cute::warpgroup_fence_operand(tO(kFirst / 2 + i));
    }
  }

  template <class AccumulatorO>
  CUTE_DEVICE static void rescale_output(AccumulatorO& tO, const typename T::Softmax& softmax) {
    CUTE_UNROLL
    for (int i = 0; i < T::kHeadDimV / 2; ++i) tO(i) *= softmax.correction[accumulator_row(i)];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) tO(T::kHeadDimV / 2 + r) *= softmax.correction[r];
  }

  // The scores of this thread's elements, by itself. Slow, and only for rows whose weights grow by
  // more than 2^120 from one tile to the next. Its keys are eight rows of the tile apart, so that
  // their places in a swizzled row are the same: two addresses serve them all.
  template <class AccumulatorS>
  CUTE_DEVICE void recompute_scores(AccumulatorS& tS) const {
    const auto* const query = shared.query[query_cursor.stage];
    const auto* const key = shared.key[key_cursor.stage];
    const int first_row = warpgroup * kWarpgroupRows + thread_row();
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) tS(i) = 0.f;
    CUTE_NO_UNROLL
    for (int d = 0; d < T::kHeadDim; ++d) {
      float rows[2];
      const typename T::Element* keys[2];
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        rows[r] = float(query[T::QTile::offset(first_row + 8 * r, d)]);
        keys[r] = key + T::KTile::offset(thread_col() + r, d);
      }
      CUTE_UNROLL
      for (int i = 0; i < cute::size(tS); ++i) {
        const float column = float(keys[i % 2][accumulator_col(i) / 8 * 8 * T::KTile::kChunkCols]);
        tS(i) = fmaf(rows[accumulator_row(i)], column, tS(i));
      }
    }
  }

  // Keys past the sequence's end may hold anything, NaN included, and P = 0 does not stop NaN. Only
  // the right-most tile can have such keys. Every warpgroup clears them for itself, before its own
  // GEMM reads them; atomically, for the others do the same and may be reading the rest.
  CUTE_DEVICE void clear_value_tail(const Mask& mask, int n) const {
    const int valid = mask.key_length - n * T::kBlockN;
    if (valid >= T::kBlockN) return;
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

  // O over its sum of weights, rounded to the type that the call asks for, and the LSE.
  template <class AccumulatorO>
  CUTE_DEVICE void finish(const AccumulatorO& tO, typename T::Softmax& softmax,
                          const WorkTile& tile, const Mask& mask, int row) {
    const int first_row = row + thread_row();
    const bool exists[2] = {first_row < mask.query_length, first_row + 8 < mask.query_length};
    float lse[2];
    bool empty[2];
    const bool is_valid = this->intervals().is_valid;
    if (!is_valid) softmax.poison();
    softmax.finish(exists, lse, empty);
    this->store_rows(p.lse, lse, tile, first_row);

    const int batch_head = tile.batch * p.scheduler.num_heads + tile.head;
    const float value_descale = __ldg(p.value_descale + batch_head / p.heads_per_kv_head);
    float factor[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      factor[r] = is_valid ? value_descale / tO(T::kHeadDimV / 2 + r) : lse[r];
    }
    auto out = cute::make_tensor<float>(cute::Int<T::kHeadDimV / 2>{});
    CUTE_UNROLL
    for (int i = 0; i < cute::size(out); ++i) {
      const int r = accumulator_row(i);
      out(i) = empty[r] ? 0.f : tO(i) * factor[r];
    }
    store_output(out, tile, row);
  }

  // As ForwardConsumer::store_output, rounded to the type that the call asks for.
  template <class Output>
  CUTE_DEVICE void store_output(const Output& out, const WorkTile& tile, int row) {
    using namespace cute;
    const bool leader = threadIdx.x % kWarpgroupThreads == 0;
    if (leader) tma_store_wait<0>();
    sync_warpgroup();
    auto rounded = make_tensor_like<std::uint16_t>(out);
    if (p.out_is_fp16) {
      auto fp16 = recast<cutlass::half_t>(rounded);
      convert(out, fp16);
    } else {
      auto bf16 = recast<cutlass::bfloat16_t>(rounded);
      convert(out, bf16);
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
