// Everything that the dQ kernel makes of a backward Config: tiles, MMAs, shared memory, thread
// roles.
#pragma once

#include "attention/kv.cuh"
#include "attention/mask.cuh"
#include "attention/row_statistics.cuh"
#include "attention/scheduler.cuh"
#include "attention/score.cuh"
#include "device/mma.cuh"
#include "device/pipeline.cuh"
#include "device/warpgroup.cuh"
#include "kernels/backward_dq/plan.h"
#include "kernels/dense.cuh"
#include "kernels/params.h"

namespace jax_fa3 {

// What the kernel is launched with. Tensor maps travel by value.
struct DQueryMaps {
  CUtensorMap query;   // boxes of 64 rows
  CUtensorMap dout;    // boxes of 64 rows
  CUtensorMap key;     // boxes of kBlockN rows
  CUtensorMap value;   // boxes of kBlockN rows
  CUtensorMap dquery;  // boxes of 64 rows
};
struct DQueryParams : DQueryMaps, CommonParams {
  TileScheduler scheduler;          // blocks of queries, query heads
  int statistics_rows;              // of a head: seqlen_q, padded
  const RowStatistics* statistics;  // [b, h_q, statistics_rows]
};

using DenseDQueryParams = WithDense<DQueryParams>;  // boxes of bias have kBlockM rows

template <class Config>
struct DQueryTraits {
  static constexpr bool kListed = is_listed(Config::kVariant);  // key tiles are those of a list
  static constexpr bool kTakesBias = kListed && !has_function(Config::kVariant);
  static constexpr Variant kVariant = Config::kVariant;
  using Params = ParamsOf<kVariant, cute::conditional_t<kListed, DenseDQueryParams, DQueryParams>>;
  using Element = ElementOf<Config::kDType>;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kHeadDimV = Config::kHeadDimV;
  static constexpr int kBlockM = dquery_block_m(kHeadDim, Config::kVariant);
  static constexpr int kConsumers = kBlockM / kWarpgroupRows;
  // As many keys as registers hold of S and dP beside dQ and the dS before; or shared memory, of
  // keys and bias.
  // A tile is within a block of a block mask, which has multiples of 128.
  static constexpr int kBlockN = kListed && kHeadDim > 192            ? 32
                                 : kVariant == Variant::kBlocks       ? 64
                                 : kConsumers == 2 && kHeadDim <= 128 ? 96
                                                                      : 64;

  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr Registers kRegisters = registers_of(kConsumers, kHeadDim > 192 && !kListed);

  using QTile = SmemTile<Element, kBlockM, kHeadDim>;
  using DOTile = SmemTile<Element, kBlockM, kHeadDimV>;
  using KTile = SmemTile<Element, kBlockN, kHeadDim>;
  using VTile = SmemTile<Element, kBlockN, kHeadDimV>;
  using BiasTile = SmemTile<Element, kBlockM, kBlockN>;

  // S = Q K^T, dP = dO V^T, dQ += dS K with dS from registers.
  using MmaS = MmaSS<Element, kBlockN, Major::K, Major::K>;
  using MmaDQ = MmaRS<Element, kHeadDim, Major::MN>;

  using Source = Contiguous<KTile, VTile>;
  using Score = BackwardScoreOf<Config::kVariant>;
  using Masking = RowIntervals;

  // V is used early in a step and K to its end: K has a stage more where there is no room for two
  // of both. Bias is beside V.
  static constexpr int kFreeBytes = 226 * 1024 - QTile::kBytes - DOTile::kBytes;
  static constexpr int kValueBytes = VTile::kBytes + (kTakesBias ? BiasTile::kBytes : 0);
  static constexpr int kPairs = kFreeBytes / (KTile::kBytes + kValueBytes);
  static constexpr int kValueStages = kPairs < 4 ? kPairs : 4;
  static constexpr int kKeyStages = kValueStages == 1 ? 2 : kValueStages;
  static_assert(kKeyStages * KTile::kBytes + kValueStages * kValueBytes <= kFreeBytes);

  using Works = WorkQueue<kListed ? 1 : 1 + kConsumers>;
  using Tiles = KeyTiles<kBlockM, kBlockN>;
  // Done with a stage of V: each warpgroup, or each warp, which reads bias by itself.
  static constexpr int kValueReleases = kConsumers * (kListed ? kWarpgroupThreads / 32 : 1);

  struct DenseStages {
    alignas(1024) Element bias[kValueStages][kTakesBias ? BiasTile::kElements : 8];
    int key_tile[kKeyStages];  // its number
    TileCounts counts;
    // The producer's, which has few registers.
    typename Works::Load load;
    Tiles tiles;
  };
  struct Nothing {};

  struct SharedStorage : cute::conditional_t<kListed, DenseStages, Nothing> {
    alignas(1024) Element query[QTile::kElements];  // in the end dQ
    alignas(1024) Element dout[DOTile::kElements];
    alignas(1024) Element key[kKeyStages][KTile::kElements];
    alignas(1024) Element value[kValueStages][VTile::kElements];
    Works works;
    RingBarriers<1> query_ring[kConsumers];  // Q and dO, each its own 64 rows
    RingBarriers<kKeyStages> key_ring;
    RingBarriers<kValueStages> value_ring;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

}  // namespace jax_fa3
