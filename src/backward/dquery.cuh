// dQ by a kernel of its own: a block of queries against all the keys that they see, dQ in registers
// throughout, as the forward pass has O. It makes S and dP a second time, seven GEMMs for the whole
// backward pass instead of five, but no CTA adds to another's memory: no float32 workspace, no
// kernels before and after that fill and empty it, and equal bits each time.
//
//   for each key tile, right to left:
//     issue S = Q K^T, dP = dO V^T
//     free the K of the tile before, whose dQ has been made meanwhile
//     P = exp2(scale S - LSE);  dS = P (dP - delta)
//     issue dQ += dS K
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "attention/scheduler.cuh"
#include "attention/softmax.cuh"
#include "backward/config.h"
#include "backward/statistics.cuh"
#include "device/mma.cuh"
#include "device/pipeline.cuh"

namespace jax_fa3 {

struct DQueryParams {
  CUtensorMap query;        // boxes of 64 rows
  CUtensorMap dout;         // boxes of 64 rows
  CUtensorMap key;          // boxes of kBlockN rows
  CUtensorMap value;        // boxes of kBlockN rows
  CUtensorMap dquery;       // boxes of 64 rows
  TileScheduler scheduler;  // blocks of queries, query heads
  MaskOptions mask;
  IndexArrays index;
  int seqlen_q;
  int seqlen_k;
  int heads_per_kv_head;
  int statistics_rows;  // of a head: seqlen_q, padded
  float softmax_scale;
  float softmax_scale_log2;
  const RowStatistics* statistics;  // [b, h_q, statistics_rows]
};

template <class Config>
struct DQueryTraits {
  using Element = ElementOf<Config::kDType>;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kHeadDimV = Config::kHeadDimV;
  static constexpr int kBlockM = dquery_block_m(kHeadDim);
  // As many keys as registers hold of S and dP beside dQ and the dS before.
  static constexpr int kBlockN = kHeadDim > 96 && kHeadDim <= 128 ? 96 : 64;

  static constexpr int kConsumers = kBlockM / kWarpgroupRows;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  // Together what the launch gives: 168 registers to each of 384 threads, 128 to each of 512. The
  // widest dQ takes from the producer what it can spare.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : kHeadDim > 192 ? 24 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : kHeadDim > 192 ? 240 : 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters ==
                (kConsumers == 3 ? 4 * 128 : 3 * 168));

  using QTile = SmemTile<Element, kBlockM, kHeadDim>;
  using DOTile = SmemTile<Element, kBlockM, kHeadDimV>;
  using KTile = SmemTile<Element, kBlockN, kHeadDim>;
  using VTile = SmemTile<Element, kBlockN, kHeadDimV>;

  using MmaS = MmaSS<Element, kBlockN, Major::K, Major::K>;
  using MmaDQ = MmaRS<Element, kHeadDim, Major::MN>;

  // V is used early in a step and K to its end: K has a stage more where there is no room for two
  // of both.
  static constexpr int kFreeBytes = 226 * 1024 - QTile::kBytes - DOTile::kBytes;
  static constexpr int kPairs = kFreeBytes / (KTile::kBytes + VTile::kBytes);
  static constexpr int kValueStages = kPairs < 4 ? kPairs : 4;
  static constexpr int kKeyStages = kValueStages == 1 ? 2 : kValueStages;
  static_assert(kKeyStages * KTile::kBytes + kValueStages * VTile::kBytes <= kFreeBytes);

  using Works = WorkQueue<1 + kConsumers>;

  struct SharedStorage {
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

template <class T>
CUTE_DEVICE void produce(const DQueryParams& p, typename T::SharedStorage& shared) {
  RingCursor<1> query_cursor;
  typename T::Works::Cursor works_cursor;
  RingCursor<T::kKeyStages> key_cursor;
  RingCursor<T::kValueStages> value_cursor;

  for (typename T::Works::Load load; shared.works.take(works_cursor, load);) {
    const WorkTile tile = load.tile;
    const int head_kv = load.head_kv;
    const TileRange keys = load.range;
    const int row = tile.block * T::kBlockM;

    const auto load_queries = [&] {
      CUTE_NO_UNROLL
      for (int w = 0; w < T::kConsumers; ++w) {
        auto& full = acquire(shared.query_ring[w], query_cursor,
                             (T::QTile::kBytes + T::DOTile::kBytes) / T::kConsumers);
        load_rows<typename T::QTile>(p.query, full, kEvictFirst, shared.query, w * kWarpgroupRows,
                                     row + w * kWarpgroupRows, tile.head, tile.batch);
        load_rows<typename T::DOTile>(p.dout, full, kEvictFirst, shared.dout, w * kWarpgroupRows,
                                      row + w * kWarpgroupRows, tile.head, tile.batch);
      }
      query_cursor.advance();
    };
    if (keys.empty()) load_queries();  // nobody reads them, but the rings stay in step
    CUTE_NO_UNROLL
    for (int n = keys.end - 1; n >= keys.begin; --n) {
      auto& key_full = acquire(shared.key_ring, key_cursor, T::KTile::kBytes);
      load_tile<typename T::KTile>(p.key, key_full, kEvictLast, shared.key[key_cursor.stage],
                                   n * T::kBlockN, head_kv, tile.batch);
      key_cursor.advance();
      if (n == keys.end - 1) load_queries();  // after the first K, which does not wait for them
      auto& value_full = acquire(shared.value_ring, value_cursor, T::VTile::kBytes);
      load_tile<typename T::VTile>(p.value, value_full, kEvictLast,
                                   shared.value[value_cursor.stage], n * T::kBlockN, head_kv,
                                   tile.batch);
      value_cursor.advance();
    }
  }
}

// One consumer warpgroup: 64 query rows of each work tile.
template <class T>
struct DQueryConsumer {
  using NamedBarrier = cutlass::arch::NamedBarrier;

  const DQueryParams& p;
  typename T::SharedStorage& shared;
  const int warpgroup;

  RingCursor<1> query_cursor;
  typename T::Works::Cursor works_cursor;
  RingCursor<T::kKeyStages> key_cursor;   // whose S comes next
  RingCursor<T::kKeyStages> used_cursor;  // whose dQ has been issued last
  RingCursor<T::kValueStages> value_cursor;

  CUTE_DEVICE void sync_warpgroup() const { NamedBarrier::sync(kWarpgroupThreads, 1 + warpgroup); }

  CUTE_DEVICE void release_key() {
    release(shared.key_ring, used_cursor);
    used_cursor.advance();
  }
  CUTE_DEVICE void release_value() {
    release(shared.value_ring, value_cursor);
    value_cursor.advance();
  }
  // Passes over key tiles that the other warpgroup's rows see and none of this one's does.
  CUTE_DEVICE void skip(int tiles) {
    for (int i = 0; i < tiles; ++i) {
      wait_full(shared.key_ring, key_cursor);
      key_cursor.advance();
      release_key();
      wait_full(shared.value_ring, value_cursor);
      release_value();
    }
  }

  // Rows past the sequence's keys may hold anything, NaN included, and P = 0 does not stop NaN.
  // Only the right-most tile can have such rows. Each warpgroup clears for itself.
  CUTE_DEVICE void clear_key_tail(const Mask& mask, int n) const {
    const int valid = mask.key_length - n * T::kBlockN;
    if (mask.key_length == p.seqlen_k || valid >= T::kBlockN) return;
    const int thread = threadIdx.x % kWarpgroupThreads;
    wait_full(shared.key_ring, key_cursor);
    wait_full(shared.value_ring, value_cursor);
    T::KTile::zero_rows_from(shared.key[key_cursor.stage], valid, thread, kWarpgroupThreads);
    T::VTile::zero_rows_from(shared.value[value_cursor.stage], valid, thread, kWarpgroupThreads);
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup();
  }

  // Adds the gradient by way of the keys [begin, end) that this warpgroup's rows see.
  template <class AccumulatorDQ>
  CUTE_DEVICE void attend(AccumulatorDQ& tDQ, const Mask& mask, const TileRange& keys, int row,
                          const float (&negative_lse_log2)[2], const float (&negative_delta)[2]) {
    using namespace cute;
    typename T::MmaS mma_s;
    typename T::MmaDQ mma_dq;
    const auto tSrQ = operand_a(mma_s, T::QTile::row_block(shared.query, warpgroup));
    const auto tDPrDO = operand_a(mma_s, T::DOTile::row_block(shared.dout, warpgroup));
    auto tDS = make_operand_a<typename T::Element, T::kBlockN>();

    clear_key_tail(mask, keys.end - 1);
    CUTE_NO_UNROLL
    for (int n = keys.end - 1; n >= keys.begin; --n) {
      auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
      auto tDP = make_accumulator<typename T::MmaS, T::kBlockN>();
      const auto key = key_cursor.stage;
      wait_full(shared.key_ring, key_cursor);
      issue_mma<Accumulate::kOverwrite>(mma_s, tSrQ,
                                        operand_b(mma_s, T::KTile::tensor(shared.key[key])), tS);
      key_cursor.advance();
      wait_full(shared.value_ring, value_cursor);
      issue_mma<Accumulate::kOverwrite>(
          mma_s, tDPrDO, operand_b(mma_s, T::VTile::tensor(shared.value[value_cursor.stage])), tDP);

      wait_mma<2>(tDQ);
      if (n != keys.end - 1) release_key();
      wait_mma<1>(tS);
      // A vote, because dP is in flight: only a branch known to be uniform leaves it alone.
      if (__any_sync(0xffffffff, keys.cuts(n))) mask_scores(tS, mask, row, n * T::kBlockN);
      CUTE_UNROLL
      for (int i = 0; i < size(tS); ++i) {
        tS(i) =
            exp2_approx(fmaf(tS(i), p.softmax_scale_log2, negative_lse_log2[accumulator_row(i)]));
      }
      wait_mma<0>(tDP);
      release_value();
      CUTE_UNROLL
      for (int i = 0; i < size(tDP); ++i) {
        tDP(i) = tS(i) * (tDP(i) + negative_delta[accumulator_row(i)]);
      }
      convert(tDP, tDS);
      issue_mma<Accumulate::kAdd>(mma_dq, tDS,
                                  operand_b(mma_dq, T::KTile::transposed(shared.key[key])), tDQ);
    }
    wait_mma<0>(tDQ);
    release_key();
  }

  CUTE_DEVICE void run() {
    using namespace cute;
    for (Work work; !(work = shared.works.read(works_cursor)).none();) {
      const auto& [tile, mask] = work;
      const int row = tile.block * T::kBlockM + warpgroup * kWarpgroupRows;
      // What the producer loads, and what of it this warpgroup's rows see.
      const TileRange loaded = shared.works.range(works_cursor, 0);
      const TileRange keys = shared.works.range(works_cursor, 1 + warpgroup);

      bool active[2];  // rows that exist and see a key
      float negative_lse_log2[2], negative_delta[2];
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int my_row = row + thread_row() + 8 * r;
        active[r] = false;
        negative_lse_log2[r] = negative_delta[r] = 0.f;
        if (my_row >= mask.query_length) continue;
        const std::int64_t head = std::int64_t(tile.batch) * p.scheduler.num_heads + tile.head;
        const RowStatistics statistics = p.statistics[head * p.statistics_rows + my_row];
        const float negative_lse = RowStatistics::sum(statistics.negative_lse);
        active[r] = !(negative_lse <= 0.5f * RowStatistics::kNoGradient);
        negative_lse_log2[r] = negative_lse * p.softmax_scale_log2;
        negative_delta[r] = RowStatistics::sum(statistics.negative_delta);
      }

      auto tDQ = make_accumulator<typename T::MmaDQ, T::kHeadDim>();
      clear(tDQ);
      wait_full(shared.query_ring[warpgroup], query_cursor);
      if (keys.empty()) {
        skip(loaded.end - loaded.begin);
      } else {
        skip(loaded.end - keys.end);
        attend(tDQ, mask, keys, row, negative_lse_log2, negative_delta);
        skip(keys.begin - loaded.begin);
      }
      CUTE_UNROLL
      for (int i = 0; i < size(tDQ); ++i) {
        tDQ(i) = active[accumulator_row(i)] ? finite_or_nan(tDQ(i)) * p.softmax_scale : 0.f;
      }
      store_output(tDQ, tile, row);
      release(shared.query_ring[warpgroup], query_cursor);
      query_cursor.advance();
      // Not before the barrier of store_output: by then every warp has read it.
      release(shared.works.ring, works_cursor);
      works_cursor.advance();
    }
  }

  // Registers to shared memory, where Q was, to global memory: this warpgroup's 64 rows. On return
  // its leader knows that the buffer has been read.
  template <class AccumulatorDQ>
  CUTE_DEVICE void store_output(const AccumulatorDQ& tDQ, const WorkTile& tile, int row) const {
    store_accumulator<typename T::QTile>(tDQ, shared.query, warpgroup * kWarpgroupRows);
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup();
    if (threadIdx.x % kWarpgroupThreads == 0) {
      if (row < p.seqlen_q) {
        store_tile<typename T::QTile>(p.dquery, shared.query, warpgroup * kWarpgroupRows, row,
                                      tile.head, tile.batch);
      }
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();
    }
  }
};

template <class Config>
__global__ void __launch_bounds__(DQueryTraits<Config>::kThreads, 1)
    dquery_kernel(const __grid_constant__ DQueryParams p) {
  using T = DQueryTraits<Config>;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename T::SharedStorage*>(shared_bytes);

  if (threadIdx.x == 0) {
    prefetch_maps({&p.query, &p.dout, &p.key, &p.value, &p.dquery});
    shared.works.ring.init(T::kConsumers + 1);
    for (auto& ring : shared.query_ring) ring.init(1);
    shared.key_ring.init(T::kConsumers);
    shared.value_ring.init(T::kConsumers);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<T::kProducerRegisters>();
    if (threadIdx.x == 0) produce<T>(p, shared);
    if (threadIdx.x == kSchedulingThread) shared.works.fill(p, visible_keys<T>);
  } else {
    cutlass::arch::warpgroup_reg_alloc<T::kConsumerRegisters>();
    DQueryConsumer<T>{p, shared, warpgroup - 1}.run();
  }
}

}  // namespace jax_fa3
