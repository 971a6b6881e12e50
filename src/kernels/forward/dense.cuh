// The forward kernels of calls with a dense bias or mask. Beside K a stage has its tile of bias,
// which is added to the scores before anything else sees them; key tiles are those of a list
// (kernels/dense.cuh), which all warpgroups visit whole.
#pragma once

#include "kernels/dense.cuh"
#include "kernels/forward/consumer.cuh"
#include "kernels/forward/producer.cuh"

namespace jax_fa3 {

using DenseForwardParams = WithDense<ForwardParams>;  // boxes of bias have kBlockM rows

template <class Config>
struct DenseForwardOperands : ForwardOperands<Config> {
  using Base = ForwardOperands<Config>;
  using Params = ParamsOf<Config::kVariant, DenseForwardParams>;
  using BiasTile = SmemTile<typename Base::Element, Base::kBlockM, Base::kBlockN>;

  static constexpr bool kTakesBias = Config::kVariant == Variant::kBias;
  static constexpr int kBiasElements = kTakesBias ? BiasTile::kElements : 0;  // of a stage
  static constexpr int kKeyBytes =
      Base::KTile::kBytes + kBiasElements * int(sizeof(typename Base::Element));
  static constexpr bool kWide = false;  // the walk of a list needs some, too
};

template <class Config>
struct DenseForwardTraits : ForwardLayout<DenseForwardOperands<Config>> {
  using Base = ForwardLayout<DenseForwardOperands<Config>>;
  using typename Base::BiasTile;
  using Works = WorkQueue<1>;
  using Tiles = KeyTiles<Base::kBlockM, Base::kBlockN>;

  struct SharedStorage : Base::template Storage<Works> {
    alignas(1024) typename Base::Element bias[Base::kStages][cute::max(Base::kBiasElements, 8)];
    int key_tile[Base::kStages];  // its number
    TileCounts counts[Base::kQueryStages];
    // The producer's, which has few registers.
    typename Works::Load load;
    Tiles tiles;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);

  // Warps read bias by themselves.
  static constexpr int kKeyReleases = Base::kConsumers * kWarpgroupThreads / 32;
  static constexpr bool kListed = true;
};

// As produce, with the tiles of a list. A warp walks it, and its first lane loads.
template <class T>
CUTE_DEVICE void produce_listed(const typename T::Params& p, typename T::SharedStorage& shared) {
  const bool loads = threadIdx.x == 0;
  typename T::QueryCursor query_cursor;
  typename T::Works::Cursor works_cursor;
  typename T::Cursor key_cursor, value_cursor;

  const auto& [tile, head_kv, range] = shared.load;
  const int& row = shared.tiles.row;
  for (typename T::Works::Load load; shared.works.take_by_warp(works_cursor, load);) {
    if (loads) {
      shared.load = load;
      shared.tiles = {p.dense.mask_of(tile.batch, tile.head), range, tile.block * T::kBlockM};
    }
    __syncwarp();
    KeyWalk walk(shared.tiles);
    const TileCounts counts = walk.count();
    int value_tile = -1;  // whose V is yet to be loaded
    bool more, queries_loaded = false;
    do {
      more = walk.next();
      if (more && loads) {
        wait_empty(shared.key_ring, key_cursor);
        shared.key_tile[key_cursor.stage] = walk.n;
        int key_bytes = T::KTile::kBytes;
        if constexpr (T::kTakesBias) key_bytes += p.dense.bias_bytes;
        auto& full = acquire(shared.key_ring, key_cursor, key_bytes);
        T::Source::load_key(p, full, shared.key[key_cursor.stage], walk.n * T::kBlockN, head_kv,
                            tile.batch);
        if constexpr (T::kTakesBias) {
          p.dense.template load_bias<typename T::BiasTile>(
              p.bias, full, shared.bias[key_cursor.stage], row, walk.n * T::kBlockN, tile.head,
              tile.batch);
        }
        key_cursor.advance();
      }
      if (!queries_loaded && loads) {
        for (int w = 0; w < T::kConsumers; ++w) wait_empty(shared.query_ring[w], query_cursor);
        shared.counts[query_cursor.stage] = counts;
        load_queries<T>(p, shared, query_cursor, tile);
        queries_loaded = true;
      }
      if (value_tile >= 0 && loads) {
        auto& full = acquire(shared.value_ring, value_cursor, T::VTile::kBytes);
        T::Source::load_value(p, full, shared.value[value_cursor.stage], value_tile * T::kBlockN,
                              head_kv, tile.batch);
        value_cursor.advance();
      }
      value_tile = walk.n;
    } while (more);
  }
}

template <class T>
struct DenseForwardConsumer : ForwardConsumer<T> {
  using Base = ForwardConsumer<T>;
  using Base::key_cursor;
  using Base::p;
  using Base::query_cursor;
  using Base::shared;
  using Base::value_cursor;
  using Base::warpgroup;
  using Base::works_cursor;

  // The work tiles one after another, as ForwardConsumer::run.
  CUTE_DEVICE void run() {
    using namespace cute;
    if (warpgroup == T::kConsumers - 1) this->pass_turn();  // the first turn is warpgroup 0's
    for (Work work; !(work = shared.works.read(works_cursor)).none();) {
      const int row = work.tile.block * T::kBlockM + warpgroup * kWarpgroupRows;
      auto tO = make_accumulator<typename T::MmaO, T::kHeadDimV>();
      clear(tO);
      typename T::Softmax softmax{p.rescale_threshold, p.negative_threshold};
      wait_full(shared.query_ring[warpgroup], query_cursor);
      const TileCounts keys = broadcast(shared.counts[query_cursor.stage]);
      if (!keys.empty()) {
        attend(tO, softmax, work, keys, row);
      } else {
        if constexpr (T::kOwnOutput) release(shared.query_ring[warpgroup], query_cursor);
        this->free_staged_output();
      }
      this->finish_tile(tO, softmax, work, row);
    }
    tma_store_wait<0>();  // shared memory must outlive the last store
  }

  // As ForwardConsumer::attend, the cut tiles first and then the full ones.
  template <class AccumulatorO>
  CUTE_DEVICE void attend(AccumulatorO& tO, typename T::Softmax& softmax, const Work& work,
                          const TileCounts& keys, int row) {
    using namespace cute;
    const auto tSrQ = this->queries();
    auto tP = make_operand_a<typename T::Element, T::kBlockN>();
    const float scale_log2 = this->scale_log2();

    const typename T::Score score(p.score, work.tile.batch, work.tile.head);
    const int position = row + work.mask.first + p.mask.window_left;  // of the first row

    constexpr bool kHasBlocks = T::kVariant == Variant::kBlocks;
    using Bits = conditional_t<kHasBlocks, TileClass, MaskBits<T::kBlockN>>;
    // Of the next stage of keys, while their product is under way.
    const auto mask_bits = [&](auto masked) {
      if constexpr (decltype(masked)::value) {
        if (p.dense.has_mask) {
          const DenseMask mask = p.dense.mask_of(work.tile.batch, work.tile.head);
          const int key = shared.key_tile[key_cursor.stage] * T::kBlockN;
          if constexpr (kHasBlocks) {
            return mask.classify(work.tile.block * T::kBlockM, T::kBlockM, key, T::kBlockN);
          } else {
            return Bits::of_rows(mask, row, key);
          }
        }
      }
      return Bits();
    };
    // From products to scores, less a shift; then the stage of K and bias is free.
    const auto finish_scores = [&](auto& tS, auto masked, const Bits& bits) {
      if constexpr (T::kTakesBias) {
        add_bias<typename T::BiasTile>(tS, shared.bias[key_cursor.stage],
                                       warpgroup * kWarpgroupRows, p.dense.bias_factor,
                                       p.dense.bias_row_mask);
      }
      const int key = shared.key_tile[key_cursor.stage] * T::kBlockN;
      release_by_warp(shared.key_ring, key_cursor);
      key_cursor.advance();
      const auto shift = [&] {
        if constexpr (kHasBlocks) {
          const bool asks = decltype(masked)::value && !bits.all;
          return score.template apply<Rows::kQueries>(tS, {row, position, key}, asks);
        } else {
          return NoShift();
        }
      }();
      if constexpr (decltype(masked)::value) {
        T::Masking::mask_scores(tS, work.mask, this->intervals(), row, key);
        if constexpr (!kHasBlocks) {
          if (p.dense.has_mask) bits.apply(tS);
        }
      }
      return shift;
    };

    {
      auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
      this->issue_scores(tSrQ, tS);
      this->free_staged_output();  // not before: nobody needs that stage yet
      const int n = shared.key_tile[key_cursor.stage];
      const auto shift = [&] {
        if (keys.cut > 0) {
          const Bits bits = mask_bits(true_type{});
          wait_mma<0>(tS);
          return finish_scores(tS, true_type{}, bits);
        }
        wait_mma<0>(tS);
        return finish_scores(tS, false_type{}, Bits());
      }();
      softmax.begin(tS, scale_log2, shift);  // O is zero: no rescale
      convert(tS, tP);
      this->clear_value_tail(work.mask, n);  // the right-most tile, if it has rows to clear
    }

    const auto step = [&](auto masked) {
      auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
      this->take_turn();
      this->issue_scores(tSrQ, tS);
      this->issue_output(tP, tO);
      this->pass_turn();
      const Bits bits = mask_bits(masked);
      wait_mma<1>(tS);
      const auto shift = finish_scores(tS, masked, bits);
      const bool rescale = softmax.update(tS, scale_log2, shift);
      this->finish_output(tO);
      convert(tS, tP);
      if (rescale) softmax.rescale(tO);
    };
    for (int i = 1; i < keys.cut; ++i) step(true_type{});
    for (int i = keys.cut > 0 ? 0 : 1; i < keys.full; ++i) step(false_type{});

    if constexpr (T::kOwnOutput) release(shared.query_ring[warpgroup], query_cursor);
    this->issue_output(tP, tO);
    this->finish_output(tO);
  }
};

// A Config's traits, without building those of the other kind.
template <class Config, bool kIsDense = is_listed(Config::kVariant)>
struct TraitsChoice {
  using Type = ForwardTraits<Config>;
};
template <class Config>
struct TraitsChoice<Config, true> {
  using Type = DenseForwardTraits<Config>;
};
template <class Config>
using TraitsOf = typename TraitsChoice<Config>::Type;

template <class Traits>
using ConsumerOf =
    cute::conditional_t<Traits::kListed, DenseForwardConsumer<Traits>, ForwardConsumer<Traits>>;

}  // namespace jax_fa3
