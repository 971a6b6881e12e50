// The forward kernel without warp specialisation: every warpgroup computes, one thread of them also
// loads, and after each key tile all of them meet, so that its stage can be filled again.
#pragma once

#include "benchmarks/ablation_kernels/consumer.cuh"
#include "kernels/forward/kernel.cuh"

namespace jax_fa3 {

template <class T>
struct UnspecialisedForward {
  const ForwardParams& p;
  typename T::SharedStorage& shared;
  const int warpgroup;

  std::uint32_t query_phase = 0;
  typename T::Cursor key_cursor, value_cursor;

  CUTE_DEVICE void run() {
    for (int index = blockIdx.x; index < p.scheduler.num_tiles; index += gridDim.x) {
      attend(p.scheduler.tile(index));
    }
    cute::tma_store_wait<0>();
  }

  CUTE_DEVICE void attend(const WorkTile& tile) {
    using namespace cute;
    const Mask mask = make_mask(p.mask, p.index, tile.batch, p.seqlen_q, p.seqlen_k);
    const int block_row = tile.block * T::kBlockM;
    const int row = block_row + warpgroup * kWarpgroupRows;
    const int head_kv = tile.head / p.heads_per_kv_head;
    const TileRange keys = mask.key_tiles(block_row, block_row + T::kBlockM, T::kBlockN);
    const bool leader = threadIdx.x == 0;

    const auto load_key = [&](int n, typename T::Cursor at) {
      if (!leader || n < keys.begin) return;
      auto& full = shared.key_ring.full[at.stage];
      full.arrive_and_expect_tx(T::KTile::kBytes);
      load_tile<typename T::KTile>(p.key, full, kEvictLast, shared.key[at.stage], n * T::kBlockN,
                                   head_kv, tile.batch);
    };
    const auto load_value = [&](int n, typename T::Cursor at) {
      if (!leader || n < keys.begin) return;
      auto& full = shared.value_ring.full[at.stage];
      full.arrive_and_expect_tx(T::VTile::kBytes);
      load_tile<typename T::VTile>(p.value, full, kEvictLast, shared.value[at.stage],
                                   n * T::kBlockN, head_kv, tile.batch);
    };

    if (threadIdx.x % kWarpgroupThreads == 0) tma_store_wait<0>();
    __syncthreads();  // nobody reads the tile before this one any more
    if (leader) {
      auto& full = shared.query_ring[0].full[0];
      full.arrive_and_expect_tx(T::QTile::kBytes);
      for (int w = 0; w < T::kConsumers; ++w) {
        load_rows<typename T::QTile>(p.query, full, kEvictFirst, shared.query[0],
                                     w * kWarpgroupRows, block_row + w * kWarpgroupRows, tile.head,
                                     tile.batch);
      }
    }
    auto key_ahead = key_cursor, value_ahead = value_cursor;
    for (int n = keys.end - 1; n > keys.end - 1 - T::kStages; --n) {
      load_key(n, key_ahead);
      load_value(n, value_ahead);
      key_ahead.advance();
      value_ahead.advance();
    }

    typename T::MmaS mma_s;
    typename T::MmaO mma_o;
    const auto tSrQ = operand_a(mma_s, T::QTile::row_block(shared.query[0], warpgroup));
    auto tP = make_operand_a<typename T::Element, T::kBlockN>();
    auto tO = make_accumulator<typename T::MmaO, T::kHeadDimV>();
    clear(tO);
    typename T::Softmax softmax{p.rescale_threshold, p.negative_threshold};
    shared.query_ring[0].full[0].wait(query_phase);
    query_phase ^= 1;

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

    if (!keys.empty()) {
      int n = keys.end - 1;
      {
        auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
        issue_scores(tS);
        wait_mma<0>(tS);
        if (keys.cuts(n)) T::Masking::mask_scores(tS, mask, Intervals{}, row, n * T::kBlockN);
        softmax.begin(tS, p.logit_scale_log2);
        convert(tS, tP);
        __syncthreads();
        load_key(n - T::kStages, key_cursor);
        key_cursor.advance();
      }
      CUTE_NO_UNROLL
      for (--n; n >= keys.begin; --n) {
        auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
        issue_scores(tS);
        issue_output();
        wait_mma<1>(tS);
        // A vote, because O is in flight: only a branch known to be uniform leaves it alone.
        if (__any_sync(0xffffffff, keys.cuts(n)))
          T::Masking::mask_scores(tS, mask, Intervals{}, row, n * T::kBlockN);
        const bool rescale = softmax.update(tS, p.logit_scale_log2);
        wait_mma<0>(tO);
        convert(tS, tP);
        if (rescale) softmax.rescale(tO);
        __syncthreads();
        load_key(n - T::kStages, key_cursor);
        load_value(n + 1 - T::kStages, value_cursor);
        key_cursor.advance();
        value_cursor.advance();
      }
      issue_output();
      wait_mma<0>(tO);
      value_cursor.advance();
    }

    const int first_row = row + thread_row();
    const bool exists[2] = {first_row < mask.query_length, first_row + 8 < mask.query_length};
    float lse[2];
    softmax.settle(p.logit_scale_log2);
    softmax.finish(tO, exists, -INFINITY, lse);
    ForwardConsumer<T> consumer{p, shared, warpgroup};
    consumer.store_rows(p.lse, lse, tile, first_row);
    consumer.store_output(tO, tile, row);
  }
};

template <class T>
__global__ void __launch_bounds__(T::kConsumers* kWarpgroupThreads, 1)
    unspecialised_kernel(const __grid_constant__ ForwardParams p) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename T::SharedStorage*>(shared_bytes);
  if (threadIdx.x == 0) {
    prefetch_maps({&p.query, &p.key, &p.value, &p.out});
    shared.query_ring[0].init(1);
    shared.key_ring.init(1);
    shared.value_ring.init(1);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  UnspecialisedForward<T>{p, shared, cutlass::canonical_warp_group_idx()}.run();
}

}  // namespace jax_fa3
