// Everything that follows from a Config: tiles, MMAs, shared memory, thread roles.
#pragma once

#include "attention/column_softmax.cuh"
#include "kernels/forward_cached/config.h"
#include "kernels/forward_cached/params.cuh"

namespace jax_fa3 {

template <class Config>
struct ForwardCachedTraits {
  using Element = ElementOf<Config::kDType>;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kHeadDimV = Config::kHeadDimV;
  static constexpr int kBlockRows = Config::kBlockRows;
  static constexpr int kColumns = kBlockRows;
  static constexpr int kTileKeys = kColumnTileKeys;

  using QTile = SmemTile<Element, kColumns, kHeadDim>;
  using KTile = SmemTile<Element, kTileKeys, kHeadDim>;
  using VTile = SmemTile<Element, kTileKeys, kHeadDimV>;
  using PTile = SmemTile<Element, kTileKeys, kColumns>;

  // S^T = K Q^T, O^T += V^T P^T, all operands in shared memory.
  using MmaS = MmaSS<Element, kColumns, Major::K, Major::K>;
  using MmaO = MmaSS<Element, kColumns, Major::MN, Major::MN>;
  using Softmax = ColumnSoftmax<kColumns>;

  // Roles: warpgroup 0 has a warp that loads and one that schedules; the others take every second
  // key tile each.
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
  // Narrow kernels leave registers as the launch gives them.
  static constexpr bool kMovesRegisters = kColumns > 16;
  static constexpr Registers kRegisters{88, 208};
  static constexpr int kReleases = 1;     // of a stage
  static constexpr int kUnitsBeside = 1;  // of an item (splits.h)
  static constexpr bool kSchedulesEarly = true;

  // O of one warpgroup, a column after another; the padding keeps a warp's stores apart.
  static constexpr int kStagedStride = kHeadDimV + 4;
  // What a consumer has to itself.
  struct Own {
    alignas(1024) Element query[QTile::kElements];
    alignas(1024) Element probabilities[PTile::kElements];
  };
  struct Rest {
    alignas(16) float output[kColumns * kStagedStride];
    float reference[kColumns];  // of `output`
    float sum[kColumns];
    Range column_keys[kConsumers][kColumns];
    typename Softmax::Exchange exchange[kConsumers];
    int is_last;  // of an item's parts to arrive
    PieceQueue pieces;
  };

  static constexpr int kStageBytes = KTile::kBytes + VTile::kBytes;
  static constexpr int kMostStages = 8;
  static constexpr int kFitting =
      (227 * 1024 - int(kConsumers * sizeof(Own) + sizeof(Rest)) - 512) / kStageBytes;
  static constexpr int kStages = kFitting < kMostStages ? kFitting : kMostStages;
  static_assert(kStages >= 2, "each consumer needs a stage");
  using Ring = RingBarriers<kStages>;
  using Cursor = RingCursor<kStages>;

  struct SharedStorage {
    alignas(1024) Element key[kStages][KTile::kElements];
    alignas(1024) Element value[kStages][VTile::kElements];
    Own own[kConsumers];
    Ring key_ring;
    Ring value_ring;
    Rest rest;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);

  // Named barriers.
  enum NamedBarrier : std::uint32_t {
    kOwn = 0,              // + w: all of consumer w; 128 threads
    kStaged = kConsumers,  // consumer 1 has staged its O, consumer 0 waits; 256 threads
    kTaken,                // consumer 0 has done with it, consumer 1 waits; 256 threads
  };
};

}  // namespace jax_fa3
