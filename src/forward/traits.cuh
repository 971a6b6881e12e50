// Everything that follows from a forward Config: tiles, MMAs, shared memory, thread roles.
#pragma once

#include "attention/scheduler.cuh"
#include "device/mma.cuh"
#include "device/pipeline.cuh"
#include "forward/config.h"

namespace jax_fa3 {

// What the kernel is launched with. Tensor maps travel by value, so that a captured launch stays
// valid for as long as its buffers do.
struct ForwardParams {
  CUtensorMap query;  // boxes of 64 rows
  CUtensorMap key;    // boxes of kBlockN rows
  CUtensorMap value;  // boxes of kBlockN rows
  CUtensorMap out;    // boxes of 64 rows
  TileScheduler scheduler;
  MaskOptions mask;
  IndexArrays index;
  int seqlen_q;
  int seqlen_k;
  int heads_per_kv_head;
  float softmax_scale;
  float softmax_scale_log2;
  float rescale_threshold;
  float* lse;  // [b, h_q, s_q]
};

template <class Config>
struct ForwardTraits {
  using Element = ElementOf<Config::kDType>;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kHeadDimV = Config::kHeadDimV;
  static constexpr int kBlockM = Config::kBlockM;
  static constexpr int kBlockN = Config::kBlockN;

  // Roles: warpgroup 0 produces, the others consume 64 query rows each.
  static constexpr int kConsumers = kBlockM / kWarpgroupRows;
  static constexpr bool kSpecialised = Config::kSpecialised;
  static constexpr int kThreads = (kConsumers + kSpecialised) * kWarpgroupThreads;
  static constexpr bool kPingPong = Config::kPingPong;
  static constexpr bool kOverlap = Config::kOverlap;
  static constexpr bool kConditionalRescale = Config::kConditionalRescale;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;
  static_assert(kConsumers == 2 || kConsumers == 3);
  static_assert(kConsumerRegisters * kConsumers + kProducerRegisters <= 512);

  using QTile = SmemTile<Element, kBlockM, kHeadDim>;
  using KTile = SmemTile<Element, kBlockN, kHeadDim>;
  using VTile = SmemTile<Element, kBlockN, kHeadDimV>;
  using OTile = SmemTile<Element, kBlockM, kHeadDimV>;

  // S = Q K^T, O += P V with P from registers.
  using MmaS = MmaSS<Element, kBlockN, Major::K, Major::K>;
  using MmaO = MmaRS<Element, kHeadDimV, Major::MN>;

  // As many stages as shared memory holds beside Q, up to four. O has a buffer of its own where
  // that still leaves two stages; then the next Q loads while the last P V runs. Elsewhere O is
  // staged through Q's buffer.
  static constexpr int kSharedBytes = 227 * 1024 - 1024;  // less barriers and alignment
  static constexpr int kStageBytes = KTile::kBytes + VTile::kBytes;
  static constexpr bool kOwnOutput =
      QTile::kBytes + OTile::kBytes + 2 * kStageBytes <= kSharedBytes;
  static constexpr int kFreeBytes = kSharedBytes - QTile::kBytes - (kOwnOutput ? OTile::kBytes : 0);
  static constexpr int kStages = kFreeBytes / kStageBytes < 4 ? kFreeBytes / kStageBytes : 4;
  static_assert(kStages >= 2, "K and V need two stages each");
  static_assert(kOwnOutput || OTile::kBytes <= QTile::kBytes);

  using Ring = RingBarriers<kStages>;
  using Cursor = RingCursor<kStages>;

  struct SharedStorage {
    alignas(1024) Element query[QTile::kElements];
    alignas(1024) Element key[kStages][KTile::kElements];
    alignas(1024) Element value[kStages][VTile::kElements];
    alignas(1024) Element own_output[kOwnOutput ? OTile::kElements : 8];
    TileNumbers tiles;
    RingBarriers<1> query_ring[kConsumers];  // each its own 64 rows
    Ring key_ring;
    Ring value_ring;

    CUTE_DEVICE Element* output() { return kOwnOutput ? own_output : query; }
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);

  // Named barriers: who arrives, who waits.
  enum NamedBarrier : std::uint32_t {
    kOrder = 0,            // + w: consumer w-1 arrives, consumer w waits; 256 threads
    kOutput = kConsumers,  // + w: all of consumer w; 128 threads
  };
};

}  // namespace jax_fa3
