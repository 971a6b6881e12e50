// Everything that follows from a backward Config: tiles, MMAs, shared memory, thread roles.
#pragma once

#include "attention/mask.cuh"
#include "attention/scheduler.cuh"
#include "attention/score.cuh"
#include "device/mma.cuh"
#include "device/pipeline.cuh"
#include "device/warpgroup.cuh"
#include "kernels/backward/config.h"
#include "kernels/backward/statistics.cuh"
#include "kernels/dense.cuh"
#include "kernels/params.h"

namespace jax_fa3 {

// What the main kernel is launched with. Tensor maps travel by value.
struct BackwardMaps {
  CUtensorMap query;   // boxes of kBlockM rows
  CUtensorMap dout;    // boxes of kBlockM rows
  CUtensorMap key;     // boxes of kBlockN rows
  CUtensorMap value;   // boxes of kBlockN rows
  CUtensorMap dkey;    // boxes of 64 rows
  CUtensorMap dvalue;  // boxes of 64 rows
};

// The work tiles of a chunk, numbered as all of the call's: from first_tile, with which the counter
// begins, to num_tiles.
struct ChunkScheduler : TileScheduler {
  int first_tile;

  CUTE_DEVICE int first() const { return first_tile + int(blockIdx.x); }
};

struct BackwardParams : BackwardMaps, CommonParams {
  ChunkScheduler scheduler;  // blocks of keys, kv heads
  int num_m_blocks;
  // The workspace holds those of a chunk; these are where the call's first ones would be.
  const RowStatistics* statistics;  // [b, h_q, num_m_blocks * kBlockM]
  float* dquery;  // [b, h_q, num_m_blocks, kBlockM * kHeadDim], in fragment order; fused dQ only
  bool has_grid;  // shares of dQ are rounded before they are added (dquery_grid.cuh)

  // Work tiles are of kv heads.
  JFA_HD QueryHeads query_heads(int head) const {
    return {head * heads_per_kv_head, heads_per_kv_head};
  }

  // The place of a head's query block in what has one for each.
  CUTE_DEVICE std::int64_t query_block(int batch_head, int m) const {
    return batch_head * num_m_blocks + m;
  }
};

using DenseBackwardParams = WithDense<BackwardParams>;  // boxes of bias have kBlockM rows

// The query blocks of a work tile, one after another: those that see its keys, each of all the
// query heads that share its kv head before the next. Not for a tile that no query sees. One loop
// rather than two, and with its test at the end, so that the compiler keeps out of it what does not
// change.
//
// Under a causal mask tiles end where the queries end, and begin later and later. The first half of
// a kv head's tiles goes down from the end and the second half up to it: CTAs that begin together
// with tiles of the first half, and end together with the ones that they take after them, are then
// all the way at the same queries, which L2 has.
struct QueryWalk {
  int batch_head, m;  // query heads are counted through all batches

  CUTE_DEVICE QueryWalk(const BackwardParams& p, const WorkTile& tile, const TileRange& queries)
      : first_head_((tile.batch * p.scheduler.num_heads + tile.head) * p.heads_per_kv_head),
        last_head_(first_head_ + p.heads_per_kv_head - 1),
        direction_(2 * tile.block < p.scheduler.num_blocks ? -1 : 1),
        end_(direction_ < 0 ? queries.begin - 1 : queries.end) {
    batch_head = first_head_;
    m = direction_ < 0 ? queries.end - 1 : queries.begin;
  }

  // The number of the query head among those of the tile.
  CUTE_DEVICE int head() const { return batch_head - first_head_; }

  CUTE_DEVICE int direction() const { return direction_; }

  CUTE_DEVICE bool cuts(const TileRange& queries) const { return queries.cuts(m); }

  // False: that was the last one.
  CUTE_DEVICE bool next() {
    if (batch_head++ == last_head_) {
      batch_head = first_head_;
      m += direction_;
    }
    return m != end_;
  }

 private:
  int first_head_, last_head_, direction_, end_;
};

// range_of of the main kernel, whose tiles are blocks of keys: the queries that see them. The block
// in which a sequence ends counts as cut.
template <class T>
CUTE_DEVICE TileRange visible_queries(const BackwardParams& p, const Work& work,
                                      const Intervals& intervals, int) {
  const auto& [tile, mask] = work;
  const int begin = tile.block * T::kBlockN, end = begin + T::kBlockN;
  const Bounds seen = intervals.of_keys({p.seqlen_q, p.seqlen_k}, begin, end, p.heads_per_kv_head);
  TileRange queries = mask.query_tiles(begin, end, T::kBlockM, seen);
  queries.full_end = min(queries.full_end, mask.query_length / T::kBlockM);
  queries.full_begin = min(queries.full_begin, queries.full_end);
  return queries;
}

// A step of a list: one of the walk's that a dense mask lets see the tile's keys, as the producer
// says it with the queries; or, where there is none, that.
struct ListedStep {
  int batch_head, m;
  int head_of_tile;  // the number of the query head among those of the tile
  bool is_cut, is_last, is_none;

  CUTE_DEVICE int head() const { return head_of_tile; }
  CUTE_DEVICE bool cuts(const TileRange&) const { return is_cut; }
};

// The steps of a work tile's walk.
template <int kRows, int kKeys>
struct QuerySteps {
  WorkTile tile;
  DenseMask mask;                 // of the tile's first query head
  std::int64_t mask_head_stride;  // words
  TileRange queries;
  int first_head, num_heads;  // counted through all batches
  int first_m, direction;

  CUTE_DEVICE void begin(const DenseBackwardParams& p, const WorkTile& of_tile,
                         const TileRange& range) {
    const QueryWalk walk(p, of_tile, range);
    tile = of_tile;
    mask = p.dense.mask_of(tile.batch, tile.head * p.heads_per_kv_head);
    mask_head_stride = p.dense.has_mask ? p.dense.mask_head_stride : 0;
    queries = range;
    first_head = walk.batch_head;
    num_heads = p.heads_per_kv_head;
    first_m = walk.m;
    direction = walk.direction();
  }

  CUTE_DEVICE int num_entries() const { return (queries.end - queries.begin) * num_heads; }
  CUTE_DEVICE int head(int entry) const { return entry % num_heads; }
  CUTE_DEVICE int m(int entry) const { return first_m + direction * (entry / num_heads); }
  CUTE_DEVICE Visit look(int entry) const {
    const DenseMask of_head{mask.words + head(entry) * mask_head_stride, mask.layout};
    const TileClass seen = of_head.classify(m(entry) * kRows, kRows, tile.block * kKeys, kKeys);
    if (!seen.any) return Visit::kNone;
    return queries.cuts(m(entry)) || !seen.all ? Visit::kCut : Visit::kFull;
  }
};

// Beside each stage of the queries: bias, and what is said of the step.
template <class BiasTile, int kStages>
struct BiasStages {
  alignas(1024) typename BiasTile::Element bias[kStages][BiasTile::kElements];
};
template <class Steps, int kStages>
struct ListedStages {
  ListedStep step[kStages];
  Steps steps;  // the producer's
};

template <class Config>
struct BackwardTraits {
  static constexpr bool kListed = is_listed(Config::kVariant);  // steps are those of a list
  static constexpr bool kTakesBias = Config::kVariant == Variant::kBias;
  static constexpr Variant kVariant = Config::kVariant;
  using Params =
      ParamsOf<kVariant, cute::conditional_t<kListed, DenseBackwardParams, BackwardParams>>;
  using Element = ElementOf<Config::kDType>;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kHeadDimV = Config::kHeadDimV;
  static constexpr int kBlockM = Config::kBlockM;
  static constexpr int kBlockN = Config::kBlockN;
  static constexpr bool kFusedDQ = !Config::kSeparateDQ;
  // How the consumers divide a step, kBlockM queries against kBlockN keys: dK and dV of half the
  // keys each, or, where registers do not hold both, one makes dV and the other dK.
  static constexpr bool kSplitKeys = kHeadDim <= 128;
  static_assert(kSplitKeys || !kFusedDQ);

  // Roles: warpgroup 0 produces, two consume.
  static constexpr int kConsumers = 2;
  static constexpr int kConsumerThreads = kConsumers * kWarpgroupThreads;
  static constexpr int kThreads = kConsumerThreads + kWarpgroupThreads;
  static constexpr Registers kRegisters = registers_of(kConsumers, /*wide=*/!kListed);
  static_assert(kBlockN == (kSplitKeys ? 128 : 64));
  static_assert(kBlockM == 64 || (kBlockM == 128 && kSplitKeys));

  using QTile = SmemTile<Element, kBlockM, kHeadDim>;
  using DOTile = SmemTile<Element, kBlockM, kHeadDimV>;
  using KTile = SmemTile<Element, kBlockN, kHeadDim>;
  using VTile = SmemTile<Element, kBlockN, kHeadDimV>;
  using PTile = SmemTile<Element, kBlockN, kBlockM>;  // dS^T: (key, query)
  // 64 rows of dK and dV on their way to global memory, all columns or half of them.
  // Where bias takes their room, a quarter.
  static constexpr bool kScarce = kTakesBias && kHeadDim > 192;
  static constexpr int output_cols(int cols) {
    return cols <= 128 ? cols : cols / (kScarce ? 4 : 2);
  }
  using DKTile = SmemTile<Element, kWarpgroupRows, output_cols(kHeadDim)>;
  using DVTile = SmemTile<Element, kWarpgroupRows, output_cols(kHeadDimV)>;
  using BiasTile = SmemTile<Element, kBlockM, kBlockN>;

  using MmaS = MmaSS<Element, kBlockM, Major::K, Major::K>;
  using Statistics = StatisticTile<kBlockM>;
  using MmaDV = MmaRS<Element, kHeadDimV, Major::MN>;
  using MmaDK = MmaRS<Element, kHeadDim, Major::MN>;

  using Score = BackwardScoreOf<Config::kVariant>;
  using Masking = RowIntervals;

  // dQ = dS K. With 128 queries each warpgroup has 64 rows, with 64 queries half the columns.
  // A half narrower than 64 columns would starve the tensor core: then the second half starts
  // early and the kOverlap columns that both make are kept once.
  static constexpr bool kSplitRowsDQ = kBlockM == 128;
  static constexpr int kColsDQ = kSplitRowsDQ || kHeadDim < 128 ? 64 : kHeadDim / 2;
  static constexpr int kOverlap = kSplitRowsDQ ? 0 : 2 * kColsDQ - kHeadDim;
  static_assert(!kSplitRowsDQ || kHeadDim <= 64);
  using MmaDQ = MmaSS<Element, kColsDQ, Major::MN, Major::MN>;
  static constexpr int kFirstColDQ = kSplitRowsDQ ? 0 : kHeadDim - kColsDQ;  // of warpgroup 1
  static_assert(!kFusedDQ || kFirstColDQ % KTile::kChunkCols == 0);
  // Floats of one thread's share, for both warpgroups; the skipped ones come first in the second.
  static constexpr int kSkippedDQ = kOverlap / 2;
  static constexpr bool kTakesGrid = kFusedDQ && takes_grid(kVariant);
  // dQ of a step is made in the next one (key_split.cuh).
  static constexpr bool kLateDQ = kFusedDQ && kHeadDim > 64;
  static constexpr int kBlockFloatsDQ = kBlockM * kHeadDim;

  // A third stage where there is room past head dim 128, whose consumers are not in step.
  static constexpr int kStages = !kSplitKeys && kHeadDimV <= 128 ? 3 : 2;
  static_assert(!kFusedDQ || kStages == 2);  // as many as buffers of dS
  static constexpr int kHandoverStages = kScarce ? 1 : 2;
  using Works = WorkQueue<1>;
  using Ring = RingBarriers<kStages>;
  using Cursor = RingCursor<kStages>;

  // What consumers write: `output` is dK and dV on their way, each warpgroup's; of both at once
  // where a warpgroup has both and there is room.
  static constexpr int kOutputBuffers = kTakesBias ? 1 : 2;
  static constexpr int kOutputElements = cute::max(DKTile::kElements, DVTile::kElements);
  struct KeySplitExchange {
    // Two buffers: a warpgroup writes the next step's while the other still reads this one's.
    alignas(1024) Element dscores[2][kFusedDQ ? PTile::kElements : 8];
    alignas(1024) Element output[2][kOutputBuffers][kOutputElements];
  };
  union GradientSplitExchange {
    // P^T, or what makes dS^T of dP^T, four floats of each thread together
    float4 factors[kHandoverStages][kBlockN * kBlockM / 4];
    alignas(1024) Element output[2][kOutputElements];
  };
  using Exchange = cute::conditional_t<kSplitKeys, KeySplitExchange, GradientSplitExchange>;

  // Done with a stage of Q: each warpgroup; or each warp of the one that is done when it has read
  // what is beside Q, the bias or the LSE.
  static constexpr bool kReadsQueryStage = kTakesBias || !Score::kIsLinear;
  static constexpr int kQueryReleases =
      kReadsQueryStage && !kSplitKeys ? 1 + kWarpgroupThreads / 32 : kConsumers;

  using Steps = QuerySteps<kBlockM, kBlockN>;
  template <int>
  struct Nothing {};

  struct SharedStorage : cute::conditional_t<kTakesBias, BiasStages<BiasTile, kStages>, Nothing<0>>,
                         cute::conditional_t<kListed, ListedStages<Steps, kStages>, Nothing<1>> {
    // What is small comes first: compute-sanitizer takes the zero strides of `constants` and
    // `statistics` for longer reads, which would leave the allocation from its end.
    StatisticConstant constants[2];  // by Statistic
    alignas(128) RowStatistics statistics[kStages][kBlockM];
    Works works;
    RingBarriers<1> demand;  // the producer has loaded all of a tile
    RingBarriers<1> key_value_ring;
    Ring query_ring;  // Q and the statistics
    Ring dout_ring;
    RingBarriers<kHandoverStages> handover_ring;  // P^T, split by gradients
    RingBarriers<1> output_ring;                  // the buffer of dK, split by gradients
    alignas(1024) Element key[KTile::kElements];
    alignas(1024) Element value[VTile::kElements];
    alignas(1024) Element query[kStages][QTile::kElements];
    alignas(1024) Element dout[kStages][DOTile::kElements];
    Exchange exchange;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);

  enum NamedBarrier : std::uint32_t {  // 0 to 7: CUTLASS keeps the other eight
    kWarpgroup = 0,                    // + w: all of consumer w, 128 threads
    // + 2 b + w: dS of consumer w in buffer b; both consumers, one arrives and the other waits
    kScores = 2,
  };
};

}  // namespace jax_fa3
