// One consumer warpgroup's share of a work tile in float8: the schedule is that of
// forward/consumer.cuh. What differs:
//   - the scale of the logits is a number per key tile: it multiplies the scores in the same FFMA
//     that subtracts the maximum, and the maximum is kept in scaled units;
//   - P is rounded to e4m3 without leaving the thread (attention/prepared_value.h);
//   - O may be summed in two levels (kPromote).
#pragma once

#include <cfloat>

#include "forward/consumer.cuh"
#include "forward_float8/traits.cuh"

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

  float value_descale = 1.f;  // of the present tile, once its keys are done

  // Keys past the sequence's end may hold anything, NaN included, and P = 0 does not stop NaN. Only
  // the right-most tile can have such keys. Every warpgroup clears them for itself, before its own
  // GEMM reads them; what another one may be reading meanwhile does not change.
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
      auto& group = *reinterpret_cast<uint4*>(&sVt(i / kGroups, first));
      group.x &= prepared_word_mask(0, valid - first);
      group.y &= prepared_word_mask(1, valid - first);
      group.z &= prepared_word_mask(2, valid - first);
      group.w &= prepared_word_mask(3, valid - first);
    }
    cutlass::arch::fence_view_async_shared();
    Base::NamedBarrier::sync(kWarpgroupThreads, T::kOutput + warpgroup);
  }

  template <class AccumulatorO>
  CUTE_DEVICE void attend(AccumulatorO& tO, Float8Softmax& softmax, const WorkTile& tile,
                          const Mask& mask, const TileRange& keys, int row) {
    typename T::MmaS mma_s;
    typename T::MmaO mma_o;
    using namespace cute;
    const auto tSrQ = operand_a(mma_s, T::QTile::row_block(shared.query, warpgroup));
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
      const auto sK = T::KTile::tensor(shared.key[key_cursor.stage]);
      issue_mma<Accumulate::kOverwrite>(mma_s, tSrQ, operand_b(mma_s, sK), tS);
    };
    const auto issue_output = [&](int n) {
      wait_full(shared.value_ring, value_cursor);
      const auto tOrV = operand_b(mma_o, T::VTile::tensor(shared.value[value_cursor.stage]));
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
      if (keys.cuts(n)) mask_scores(tS, mask, row, n * T::kBlockN);
      softmax.update(tS, scale);  // O is zero: no rescale
      convert_float8(tS, tP);
      clear_value_tail(mask, n);
    }

    const auto step = [&](auto masked) {
      auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
      const float scale = scale_log2(n);
      this->take_turn();
      issue_scores(tS);
      issue_output(n + 1);
      this->pass_turn();
      wait_mma<1>(tS);
      release(shared.key_ring, key_cursor);
      key_cursor.advance();
      if constexpr (decltype(masked)::value) mask_scores(tS, mask, row, n * T::kBlockN);
      const bool rescale = softmax.update(tS, scale);
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

    if constexpr (T::kOwnOutput) release(shared.query_ring[warpgroup], query_cursor);
    value_descale = __ldg(p.value_descale + batch_head_kv);
    issue_output(keys.begin);
    wait_mma<0>(tSum);
    release(shared.value_ring, value_cursor);
    value_cursor.advance();
    if constexpr (T::kPromote > 0) promote();
  }

  template <class AccumulatorO>
  CUTE_DEVICE void finish(AccumulatorO& tO, Float8Softmax& softmax, const bool (&exists)[2],
                          float (&lse)[2]) const {
    softmax.finish(tO, value_descale, exists, lse);
  }

  template <class AccumulatorO, class Tensor>
  CUTE_DEVICE void write_output(const AccumulatorO& tO, Tensor&& sO) const {
    auto rounded = cute::make_tensor_like<std::uint16_t>(tO);
    if (p.out_is_fp16) {
      auto fp16 = cute::recast<cutlass::half_t>(rounded);
      convert(tO, fp16);
    } else {
      auto bf16 = cute::recast<cutlass::bfloat16_t>(rounded);
      convert(tO, bf16);
    }
    store_rounded<typename T::MmaO>(rounded, sO);
  }

  CUTE_DEVICE void run() { this->run_as(*this); }
};

}  // namespace jax_fa3
