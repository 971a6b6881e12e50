// Everything that the dBias kernel makes of a backward Config: tiles, MMAs, shared memory, thread
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
#include "kernels/backward_dbias/plan.h"
#include "kernels/dense.cuh"
#include "kernels/params.h"

namespace jax_fa3 {

// What the kernel is launched with. Tensor maps travel by value.
struct DBiasMaps {
  CUtensorMap query;  // boxes of kBlockM rows
  CUtensorMap dout;   // boxes of kBlockM rows
  CUtensorMap key;    // boxes of kBlockN rows
  CUtensorMap value;  // boxes of kBlockN rows
  CUtensorMap bias;   // boxes of kBlockM rows
  CUtensorMap dbias;  // boxes of 64 rows
};
struct DBiasParams : DBiasMaps, CommonParams {
  DenseParams dense;
  BiasWork work;
  int statistics_rows;              // of a head: seqlen_q, padded
  const RowStatistics* statistics;  // [b, h_q, statistics_rows]
  // Sums of each item, in the order of fragments, or null where an item is all of a tile.
  float4* partial_sums;  // [num_items, kConsumers, kThreadFloats / 4, 128]
};

// What the scheduling warp tells producer and consumers to do next.
struct BiasStep {
  enum Kind : int {
    kFull,  // add a pair of query block and key tile whose rows see all keys
    kCut,   // the same with a mask to ask
    kEnd,   // the item's sum is complete
    kStop,  // there are no more items
  };
  Kind kind;
  int item;
  BiasBlock tile;
  // Of a pair only.
  int batch;
  int head;  // of query
  int head_kv;
  int row;
  Mask mask;           // of the sequence
  const Plane* plane;  // its row intervals, or null
};

template <class Config>
struct DBiasTraits {
  using Element = ElementOf<Config::kDType>;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kHeadDimV = Config::kHeadDimV;

  // Nothing stays in shared memory from step to step, so that L2 has to bring
  // (kBlockM + kBlockN) (d + d_v) elements to every one: the tile is as near to a square, and as
  // large, as registers hold of S, dP and the sum, and shared memory of two pairs of operands.
  static constexpr int kConsumers = 2;
  static constexpr int kBlockM = kConsumers * kWarpgroupRows;
  static constexpr int kBlockN = dbias_block_n(kHeadDim);
  static_assert(kBlockM == kDBiasBlockM);

  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr Registers kRegisters = registers_of(kConsumers, /*wide=*/false);

  using QTile = SmemTile<Element, kBlockM, kHeadDim>;
  using DOTile = SmemTile<Element, kBlockM, kHeadDimV>;
  using KTile = SmemTile<Element, kBlockN, kHeadDim>;
  using VTile = SmemTile<Element, kBlockN, kHeadDimV>;
  using BiasTile = SmemTile<Element, kBlockM, kBlockN>;
  using BiasRows = SmemTile<Element, kWarpgroupRows, kBlockN>;  // of a warpgroup

  // S = Q K^T, dP = dO V^T.
  using Mma = MmaSS<Element, kBlockN, Major::K, Major::K>;
  static constexpr int kThreadFloats = kWarpgroupRows * kBlockN / kWarpgroupThreads;

  using Source = Contiguous<KTile, VTile>;
  using Masking = RowIntervals;

  // Q with K, and dO with V and the rows' statistics: each goes when its product is made. Then
  // a second tile of bias, with which the next work tile begins while this one's dBias goes out.
  static constexpr int kQueryBytes = QTile::kBytes + KTile::kBytes;
  static constexpr int kStatisticsBytes = kBlockM * sizeof(RowStatistics);
  static constexpr int kDOutBytes = DOTile::kBytes + VTile::kBytes;
  static constexpr int kPairBytes = kQueryBytes + kDOutBytes + kStatisticsBytes;
  static constexpr int kFreeBytes = 226 * 1024;
  static constexpr int kStages = 2 * kPairBytes + BiasTile::kBytes <= kFreeBytes ? 2 : 1;
  static constexpr int kBiasStages =
      kStages * kPairBytes + 2 * BiasTile::kBytes <= kFreeBytes ? 2 : 1;

  static constexpr int kSteps = 8;  // known ahead
  // Warps read bias, statistics and steps by themselves.
  static constexpr int kConsumerWarps = kConsumers * kWarpgroupThreads / 32;

  struct SharedStorage {
    alignas(1024) Element query[kStages][QTile::kElements];
    alignas(1024) Element key[kStages][KTile::kElements];
    alignas(1024) Element dout[kStages][DOTile::kElements];
    alignas(1024) Element value[kStages][VTile::kElements];
    alignas(1024) Element bias[kBiasStages][BiasTile::kElements];  // in the end dBias
    alignas(128) RowStatistics statistics[kStages][kBlockM];
    BiasStep steps[kSteps];
    RingBarriers<kSteps> step_ring;
    RingBarriers<kStages> query_ring;  // Q and K
    RingBarriers<kStages> dout_ring;   // dO, V and the statistics
    RingBarriers<kBiasStages> bias_ring;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);

  enum NamedBarrier : std::uint32_t {
    kWarpgroup = 0,         // + w: all of consumer w, 128 threads
    kRowSums = kConsumers,  // both consumers
  };
};

}  // namespace jax_fa3
