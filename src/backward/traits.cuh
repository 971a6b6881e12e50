// Everything that follows from a backward Config: tiles, MMAs, shared memory, thread roles.
#pragma once

#include "attention/scheduler.cuh"
#include "attention/softmax.cuh"
#include "backward/config.h"
#include "backward/statistics.cuh"
#include "device/mma.cuh"
#include "device/pipeline.cuh"

namespace jax_fa3 {

// What the main kernel is launched with. Tensor maps travel by value.
struct BackwardParams {
  CUtensorMap query;        // boxes of kBlockM rows
  CUtensorMap dout;         // boxes of kBlockM rows
  CUtensorMap key;          // boxes of kBlockN rows
  CUtensorMap value;        // boxes of kBlockN rows
  CUtensorMap dkey;         // boxes of 64 rows
  CUtensorMap dvalue;       // boxes of 64 rows
  TileScheduler scheduler;  // blocks of keys, kv heads
  MaskOptions mask;
  IndexArrays index;
  int seqlen_q;
  int seqlen_k;
  int heads_per_kv_head;
  int num_m_blocks;
  float softmax_scale;
  float softmax_scale_log2;
  const RowStatistics* statistics;  // [b, h_q, num_m_blocks * kBlockM]
  float* dquery;  // [b, h_q, num_m_blocks, kBlockM * kHeadDim], in fragment order; fused dQ only
};

// The query blocks of a work tile, one after another: those that see its keys, for each query head
// that shares its kv head. One loop rather than two, for the register allocator's sake.
struct QueryWalk {
  const int first, end, end_head, num_m_blocks, num_heads, batch;
  int m, head;

  CUTE_DEVICE QueryWalk(const BackwardParams& p, const WorkTile& tile, const TileRange& queries)
      : first(queries.begin),
        end(queries.end),
        end_head(queries.empty() ? 0 : (tile.head + 1) * p.heads_per_kv_head),
        num_m_blocks(p.num_m_blocks),
        num_heads(p.scheduler.num_heads * p.heads_per_kv_head),
        batch(tile.batch),
        m(first),
        head(tile.head * p.heads_per_kv_head) {}

  CUTE_DEVICE bool more() const { return head < end_head; }
  CUTE_DEVICE void next() {
    if (++m < end) return;
    m = first;
    ++head;
  }
  // Number of the block among those of all batches and query heads.
  CUTE_DEVICE std::int64_t block() const {
    return (std::int64_t(batch) * num_heads + head) * num_m_blocks + m;
  }
};

// A work tile of the backward pass: what it is and what it has to visit.
struct BackwardTile {
  WorkTile at;
  Mask mask;
  TileRange queries;

  template <class T>
  CUTE_DEVICE static BackwardTile make(const BackwardParams& p, int index) {
    BackwardTile tile;
    tile.at = p.scheduler.tile(index);
    tile.mask = make_mask(p.mask, p.index, tile.at.batch, p.seqlen_q, p.seqlen_k);
    const int key = tile.at.block * T::kBlockN;
    tile.queries = tile.mask.query_tiles(key, key + T::kBlockN, T::kBlockM);
    return tile;
  }

  CUTE_DEVICE QueryWalk walk(const BackwardParams& p) const { return QueryWalk(p, at, queries); }
};

// How two warpgroups divide a step (kBlockM queries against kBlockN keys).
enum class Split {
  // Each has 64 of 128 keys: S^T and dP^T are A operands of its dV and dK as they stand.
  kKeys,
  // Head dims past 128: dV and dK of 64 keys no longer fit one warpgroup. Each makes S^T and dP^T
  // for half the queries, publishes P^T and dS^T, and has half the head dim of dV and dK.
  kHeadDim,
};

template <class Config>
struct BackwardTraits {
  using Element = ElementOf<Config::kDType>;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kHeadDimV = Config::kHeadDimV;
  static constexpr int kBlockM = Config::kBlockM;
  static constexpr int kBlockN = Config::kBlockN;
  static constexpr bool kFusedDQ = !Config::kSeparateDQ;
  static constexpr Split kSplit = kHeadDim <= 128 ? Split::kKeys : Split::kHeadDim;
  static constexpr bool kSplitKeys = kSplit == Split::kKeys;
  static_assert(kSplitKeys || !kFusedDQ);

  // Roles: warpgroup 0 produces, two consume.
  static constexpr int kConsumers = 2;
  static constexpr int kConsumerThreads = kConsumers * kWarpgroupThreads;
  static constexpr int kThreads = kConsumerThreads + kWarpgroupThreads;
  // Together what the launch gives 384 threads: 168 each.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters == 3 * 168);
  static_assert(kBlockN == (kSplitKeys ? 128 : 64));
  static_assert(kBlockM == 64 || (kBlockM == 128 && kSplitKeys));

  // Half tiles of dQ, dK and dV begin at a chunk.
  static constexpr int kChunkK = kHeadDim / 2 % 64 == 0 || kHeadDim == 64 ? 64 : 32;
  static constexpr int kChunkV = kHeadDimV / 2 % 64 == 0 || kHeadDimV == 64 ? 64 : 32;
  using QTile = SmemTile<Element, kBlockM, kHeadDim, kChunkK>;
  using DOTile = SmemTile<Element, kBlockM, kHeadDimV, kChunkV>;
  using KTile = SmemTile<Element, kBlockN, kHeadDim, kChunkK>;
  using VTile = SmemTile<Element, kBlockN, kHeadDimV, kChunkV>;
  using PTile = SmemTile<Element, kBlockN, kBlockM>;  // P^T and dS^T: (key, query)
  // One warpgroup's dK and dV, on their way to global memory.
  using DKTile = SmemTile<Element, kWarpgroupRows, kSplitKeys ? kHeadDim : kHeadDim / 2, kChunkK>;
  using DVTile = SmemTile<Element, kWarpgroupRows, kSplitKeys ? kHeadDimV : kHeadDimV / 2, kChunkV>;

  // Queries per warpgroup of S^T and dP^T; columns per warpgroup of dK and dV.
  static constexpr int kQueries = kSplitKeys ? kBlockM : kBlockM / 2;
  static constexpr int kColsK = DKTile::kCols;
  static constexpr int kColsV = DVTile::kCols;
  using MmaS = MmaSS<Element, kQueries, Major::K, Major::K>;
  using Statistics = StatisticTile<kQueries>;
  using MmaDV = cute::conditional_t<kSplitKeys, MmaRS<Element, kColsV, Major::MN>,
                                    MmaSS<Element, kColsV, Major::K, Major::MN>>;
  using MmaDK = cute::conditional_t<kSplitKeys, MmaRS<Element, kColsK, Major::MN>,
                                    MmaSS<Element, kColsK, Major::K, Major::MN>>;

  // Whether one warpgroup's dS goes into the other's GEMMs.
  static constexpr bool kSharesScores = kFusedDQ || !kSplitKeys;

  // dQ = dS K. With 128 queries each warpgroup has 64 rows, with 64 queries half the columns.
  // A half narrower than 64 columns would starve the tensor core: then the second half starts
  // early and the kOverlap columns that both make are kept once.
  static constexpr bool kSplitRowsDQ = kBlockM == 128;
  static constexpr int kColsDQ = kSplitRowsDQ || kHeadDim < 128 ? 64 : kHeadDim / 2;
  static constexpr int kOverlap = kSplitRowsDQ ? 0 : 2 * kColsDQ - kHeadDim;
  static_assert(!kSplitRowsDQ || kHeadDim == 64);
  using MmaDQ = MmaSS<Element, kColsDQ, Major::MN, Major::MN>;
  static constexpr int kFirstColDQ = kSplitRowsDQ ? 0 : kHeadDim - kColsDQ;  // of warpgroup 1
  // Floats of one thread's share, for both warpgroups; the skipped ones come first in the second.
  static constexpr int kSkippedDQ = kOverlap / 2;
  static constexpr int kBlockFloatsDQ = kBlockM * kHeadDim;

  static constexpr int kStages = 2;
  using Ring = RingBarriers<kStages>;
  using Cursor = RingCursor<kStages>;

  struct SharedStorage {
    // Not last: compute-sanitizer takes the halves of this operand for 16 bytes a row each.
    alignas(1024) RowStatistics statistics[kStages][kBlockM];
    alignas(1024) Element key[KTile::kElements];
    alignas(1024) Element value[VTile::kElements];
    alignas(1024) Element query[kStages][QTile::kElements];
    alignas(1024) Element dout[kStages][DOTile::kElements];
    union {
      // Two buffers: a warpgroup writes the next step's while the other still reads this one's.
      struct {
        alignas(1024) Element dscores[2][kSharesScores ? PTile::kElements : 8];
        alignas(1024) Element probabilities[kSplitKeys ? 1 : 2][kSplitKeys ? 8 : PTile::kElements];
      };
      // Between work tiles, for each warpgroup: dV, then dK.
      alignas(
          1024) Element output[kConsumers][kWarpgroupRows * (kColsK > kColsV ? kColsK : kColsV)];
    };
    TileNumbers tiles;
    RingBarriers<1> key_value_ring;
    Ring query_ring;  // Q and the statistics
    Ring dout_ring;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);

  enum NamedBarrier : std::uint32_t {
    kConsumersMeet = 0,  // both consumers, 256 threads
    kWarpgroup = 1,      // + w: all of consumer w, 128 threads
  };
};

}  // namespace jax_fa3
