// Everything that follows from a Config with more packed rows than columns: the forward kernel's
// products and roles, over the pieces and pages of caches.
#pragma once

#include "attention/kv.cuh"
#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "device/launch.cuh"
#include "kernels/forward_cached/config.h"
#include "kernels/forward_cached/params.cuh"

namespace jax_fa3 {

// The forward kernels' softmax, whose sums and references also leave as a part's.
struct RowSoftmax : OnlineSoftmax<0, false, true> {
  // Makes the sums those of whole rows.
  CUTE_DEVICE void gather() { add_quads(); }

  // A row's reference as a score; finite.
  CUTE_DEVICE float score(int r, float scale_log2) const {
    return is_huge(r) ? reference[r] : fmaxf(reference[r] / scale_log2, -FLT_MAX);
  }
};

// A packed row of a block: where it stands in arrays of [tokens, h_q], and which keys it sees.
struct PackedRow {
  int place = -1;  // there is no such row
  Range keys;
};

template <class Config>
struct CachedRowsTraits {
  using Params = ForwardCachedParams;
  using Element = ElementOf<Config::kDType>;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kHeadDimV = Config::kHeadDimV;
  static constexpr int kBlockRows = Config::kBlockRows;
  static constexpr int kTileKeys = tile_keys(Config::kKey);
  static constexpr int kBlockN = kTileKeys;

  using QTile = SmemTile<Element, kBlockRows, kHeadDim>;
  using KTile = SmemTile<Element, kTileKeys, kHeadDim>;
  using VTile = SmemTile<Element, kTileKeys, kHeadDimV>;
  using OTile = SmemTile<Element, kBlockRows, kHeadDimV>;
  static_assert(OTile::kBytes <= QTile::kBytes, "O is staged in Q");

  // S = Q K^T, O += P V with P from registers.
  using MmaS = MmaSS<Element, kTileKeys, Major::K, Major::K>;
  using MmaO = MmaRS<Element, kHeadDimV, Major::MN>;
  using Softmax = RowSoftmax;
  using Source = Paged<KTile, VTile>;

  // Roles: warpgroup 0 has a warp that loads and one that schedules; the others have 64 rows each.
  static constexpr int kConsumers = kBlockRows / kWarpgroupRows;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
  static constexpr bool kMovesRegisters = true;
  // Where head_dim is large consumers need what the scheduling warp could use.
  static constexpr Registers kRegisters = kConsumers == 3  ? registers_of(3, false)
                                          : kHeadDim > 128 ? Registers{72, 216}
                                                           : Registers{88, 208};
  // Whether the scheduling warp has registers for lengths read early, for units in 32 bits beside
  // those in 64, and for items of one walk: three consumers leave it none.
  static constexpr bool kSchedulesEarly = kConsumers < 3;
  static constexpr bool kPingPong = true;       // warpgroups issue products in turns
  static constexpr bool kOwnOutput = false;     // results leave from registers
  static constexpr int kReleases = kConsumers;  // of a stage
  static constexpr int kMostLeastPart = 12;     // tiles (splits.h)
  static constexpr int kUnitsBeside = 3;        // of an item: rows found, Q loaded, results stored

  struct Rest {
    PackedRow rows[kBlockRows];
    int is_last[kConsumers];  // of an item's parts to arrive
    PieceQueue pieces;
  };

  static constexpr int kMostStages = 6;
  static constexpr int kFitting =
      (227 * 1024 - QTile::kBytes - int(sizeof(Rest)) - 512) / (KTile::kBytes + VTile::kBytes);
  static constexpr int kStages = kFitting < kMostStages ? kFitting : kMostStages;
  static_assert(kStages >= 2, "K and V need two stages each");
  using Ring = RingBarriers<kStages>;
  using Cursor = RingCursor<kStages>;
  using Works = PieceQueue;
  using QueryCursor = RingCursor<1>;

  struct SharedStorage {
    alignas(1024) Element query[1][QTile::kElements];
    alignas(1024) Element key[kStages][KTile::kElements];
    alignas(1024) Element value[kStages][VTile::kElements];
    Ring key_ring;
    Ring value_ring;
    Rest rest;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);

  // Named barriers: who arrives, who waits.
  enum NamedBarrier : std::uint32_t {
    kOrder = 0,            // + w: consumer w-1 arrives, consumer w waits; 256 threads
    kOutput = kConsumers,  // + w: all of consumer w; 128 threads
  };
};

}  // namespace jax_fa3
