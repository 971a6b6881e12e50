// ForwardConsumer with parts that may be left out; kernels/forward/consumer.cuh explains the rest.
#pragma once

#include <string_view>

#include "kernels/forward/consumer.cuh"

// What is left out, separated by commas.
#ifndef JAX_FA3_WITHOUT
#define JAX_FA3_WITHOUT ""
#endif

namespace jax_fa3 {

constexpr bool has_part(std::string_view name) {
  return std::string_view(JAX_FA3_WITHOUT).find(name) == std::string_view::npos;
}

constexpr bool kSpecialised = has_part("specialisation");  // a warpgroup that only loads
constexpr bool kPingPong = has_part("ping-pong");          // warpgroups issue GEMMs in turns
constexpr bool kOverlap = has_part("overlap");             // softmax under the own O += P V
constexpr bool kConditionalRescale = has_part("rescale");  // or at every new maximum

template <class T>
struct AblatedConsumer : ForwardConsumer<T> {
  using Base = ForwardConsumer<T>;
  using Base::key_cursor, Base::value_cursor, Base::query_cursor, Base::works_cursor;
  using Base::p, Base::shared, Base::warpgroup;

  CUTE_DEVICE void take_turn() const {
    if constexpr (kPingPong) Base::take_turn();
  }
  CUTE_DEVICE void pass_turn() const {
    if constexpr (kPingPong) Base::pass_turn();
  }

  CUTE_DEVICE void skip(int tiles, int turns) {
    for (int i = 0; i < tiles; ++i) {
      if (i < turns) {
        take_turn();
        pass_turn();
      }
      Base::skip(1, 0);
    }
  }

  CUTE_DEVICE void run() {
    using namespace cute;
    if (warpgroup == T::kConsumers - 1) pass_turn();
    for (Work work; !(work = shared.works.read(works_cursor)).none();) {
      const auto& [tile, mask] = work;
      const int row = tile.block * T::kBlockM + warpgroup * kWarpgroupRows;
      const TileRange loaded = shared.works.range(works_cursor, 0);
      const TileRange keys = shared.works.range(works_cursor, 1 + warpgroup);

      auto tO = make_accumulator<typename T::MmaO, T::kHeadDimV>();
      clear(tO);
      typename T::Softmax softmax{kConditionalRescale ? p.rescale_threshold : 0.f,
                                  p.negative_threshold};
      wait_full(shared.query_ring[warpgroup], query_cursor);
      if (!keys.empty()) {
        skip(loaded.end - keys.end, loaded.end - keys.end);
        attend(tO, softmax, mask, keys, row);
        skip(keys.begin - loaded.begin, keys.begin - loaded.begin);
      } else {
        if constexpr (T::kOwnOutput) release(shared.query_ring[warpgroup], query_cursor);
        this->free_staged_output();
        skip(loaded.end - loaded.begin, loaded.end - loaded.begin - 1);
      }
      const int first_row = row + thread_row();
      const bool exists[2] = {first_row < mask.query_length, first_row + 8 < mask.query_length};
      float lse[2];
      softmax.settle(p.logit_scale_log2);
      softmax.finish(tO, exists, -INFINITY, lse);
      this->store_rows(p.lse, lse, tile, first_row);
      this->store_output(tO, tile, row);
      query_cursor.advance();
      this->output_is_staged = true;
      if constexpr (T::kQueryStages == 1) this->free_staged_output();
      release(shared.works.ring, works_cursor);
      works_cursor.advance();
    }
    tma_store_wait<0>();
  }

  template <class AccumulatorO>
  CUTE_DEVICE void attend(AccumulatorO& tO, typename T::Softmax& softmax, const Mask& mask,
                          const TileRange& keys, int row) {
    using namespace cute;
    typename T::MmaS mma_s;
    typename T::MmaO mma_o;
    const auto tSrQ =
        operand_a(mma_s, T::QTile::row_block(shared.query[query_cursor.stage], warpgroup));
    auto tP = make_operand_a<typename T::Element, T::kBlockN>();
    const float scale_log2 = p.logit_scale_log2;

    const auto issue_scores = [&](auto& tS) {
      wait_full(shared.key_ring, key_cursor);
      const auto sK = T::KTile::tensor(shared.key[key_cursor.stage]);
      issue_mma<Accumulate::kOverwrite>(mma_s, tSrQ, operand_b(mma_s, sK), tS);
    };
    const auto issue_output = [&] {
      wait_full(shared.value_ring, value_cursor);
      const auto sVt = T::VTile::transposed(shared.value[value_cursor.stage]);
      issue_mma<Accumulate::kAdd>(mma_o, tP, operand_b(mma_o, sVt), tO);
    };
    const auto finish_output = [&] {
      wait_mma<0>(tO);
      release(shared.value_ring, value_cursor);
      value_cursor.advance();
    };

    int n = keys.end - 1;
    {
      auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
      issue_scores(tS);
      this->free_staged_output();
      wait_mma<0>(tS);
      release(shared.key_ring, key_cursor);
      key_cursor.advance();
      if (keys.cuts(n))
        T::Masking::mask_scores(tS, mask, shared.works.intervals(works_cursor), row,
                                n * T::kBlockN);
      softmax.begin(tS, scale_log2);
      convert(tS, tP);
      this->clear_value_tail(mask, n);
    }

    const auto step = [&](auto masked) {
      auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
      take_turn();
      if constexpr (!kOverlap) {
        issue_output();
        finish_output();
      }
      issue_scores(tS);
      if constexpr (kOverlap) issue_output();
      pass_turn();
      wait_mma<kOverlap ? 1 : 0>(tS);
      release(shared.key_ring, key_cursor);
      key_cursor.advance();
      if constexpr (decltype(masked)::value) {
        T::Masking::mask_scores(tS, mask, shared.works.intervals(works_cursor), row,
                                n * T::kBlockN);
      }
      const bool rescale = softmax.update(tS, scale_log2);
      if constexpr (kOverlap) finish_output();
      convert(tS, tP);
      if (rescale) softmax.rescale(tO);
    };
    --n;
    for (; n >= keys.full_end; --n) step(true_type{});
    for (; n >= keys.full_begin; --n) step(false_type{});
    for (; n >= keys.begin; --n) step(true_type{});

    if constexpr (T::kOwnOutput) release(shared.query_ring[warpgroup], query_cursor);
    issue_output();
    finish_output();
  }
};

}  // namespace jax_fa3
