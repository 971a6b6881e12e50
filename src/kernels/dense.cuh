// Dense bias and dense masks, as the kernels that take them are launched with them, and which tiles
// those kernels visit.
//
// Their work tiles do not visit a range but what of it the mask lets them see: first the tiles that
// have to ask the mask, then those that every row sees whole. The scheduling thread counts them, the
// producer walks them, and says with each stage which tile it holds.
#pragma once

#include "attention/bias.cuh"
#include "attention/dense_mask.cuh"
#include "attention/scheduler.cuh"
#include "call/problem.h"
#include "device/tma.cuh"

namespace jax_fa3 {

struct DenseParams {
  bool has_bias;
  bool has_mask;
  float bias_factor;        // from a bias to what it adds to the product: 1 / softmax_scale
  int sequences_of_bias;    // consecutive ones that share a plane
  std::uint64_t bias_hint;  // of L2
  const std::uint32_t* mask;
  int sequences_of_mask;
  std::int64_t mask_sequence_stride;  // words from plane to plane
  std::int64_t mask_head_stride;      // words; 0 where all heads share a plane
  DenseMaskLayout mask_layout;

  CUTE_DEVICE DenseMask mask_of(int batch, int head) const {
    if (!has_mask) return {};
    return {mask + batch / sequences_of_mask * mask_sequence_stride + head * mask_head_stride,
            mask_layout};
  }

  // Loads a tile of bias, if there is any. One thread calls it.
  template <class Tile>
  CUTE_DEVICE void load_bias(const CUtensorMap& map, TransactionBarrier& full,
                             typename Tile::Element* smem, int row, int key, int head,
                             int batch) const {
    if (!has_bias) return;
    load_plane<Tile>(map, full, bias_hint, smem, row, key, head, batch / sequences_of_bias);
  }
};

inline DenseParams dense_params(const CallProblem& problem) {
  const Shape& s = problem.shape;
  const DenseArrays& dense = problem.dense;
  const Broadcast &bias = dense.bias_shape, &mask = dense.mask_shape;
  const DenseMaskLayout layout{static_cast<int>(mask.rows), static_cast<int>(s.seqlen_k)};
  const bool shares_bias = bias.sequences < s.batch || bias.heads < s.num_heads_q;
  DenseParams p;
  p.has_bias = dense.bias != nullptr;
  p.has_mask = dense.mask != nullptr;
  p.bias_factor = 1.f / problem.softmax_scale;
  p.sequences_of_bias = static_cast<int>(s.batch / bias.sequences);
  p.bias_hint = shares_bias ? kEvictLast : kEvictFirst;
  p.mask = reinterpret_cast<const std::uint32_t*>(dense.mask);
  p.sequences_of_mask = static_cast<int>(s.batch / mask.sequences);
  p.mask_sequence_stride = mask.heads * layout.words();
  p.mask_head_stride = mask.heads > 1 ? layout.words() : 0;
  p.mask_layout = layout;
  return p;
}

// The map of a bias, in boxes of Tile's rows, by (sequence plane, head, row, key); where heads or
// rows share values their strides are 0. Without a bias, of `some_address`, and never used.
template <class Tile>
Status make_bias_map(CUtensorMap* map, const CallProblem& problem, const void* some_address) {
  const Shape& s = problem.shape;
  const Broadcast& bias = problem.dense.bias_shape;
  const std::int64_t keys = padded_bias_keys(s.seqlen_k);
  const std::int64_t strides[3] = {bias.rows > 1 ? keys : 0, bias.heads > 1 ? bias.rows * keys : 0,
                                   bias.heads * bias.rows * keys};
  const void* const data = problem.dense.bias != nullptr ? problem.dense.bias : some_address;
  return encode_tensor_map<Tile>(map, data, {keys, s.seqlen_q, s.num_heads_q, bias.sequences},
                                 strides, {Tile::kChunkCols, Tile::kRows, 1, 1});
}

// Work tiles in an order that has those at work share a bias: with `batch_innermost`, sequences of
// one head go together.
struct DenseScheduler : TileScheduler {
  bool batch_innermost;

  CUTE_DEVICE WorkTile tile(int index) const {
    WorkTile tile = TileScheduler::tile(index);
    if (batch_innermost) {
      const int batch_head = tile.batch * num_heads + tile.head;
      const int batch = num_batch_heads / num_heads;
      tile.head = batch_head / batch;
      tile.batch = batch_head % batch;
    }
    return tile;
  }
};

// A kernel's parameters, and what of them is of dense arrays.
template <class Params>
struct WithDense : Params {
  using Base = Params;

  CUtensorMap bias;
  DenseParams dense;
  DenseScheduler scheduler;  // in place of the one in Params
};

// What a kernel with a BiasTile of Traits is launched with, beside what all kernels of its direction
// are, which is already there. Sequences or heads that share a bias go together, so that L2 has its
// tiles.
template <class Traits, class Params>
Status set_dense(Params* p, const CallProblem& problem, const void* some_address) {
  constexpr std::int64_t kMostTogether = 64;
  JFA_CHECK_OK(make_bias_map<typename Traits::BiasTile>(&p->bias, problem, some_address));
  p->dense = dense_params(problem);
  DenseScheduler& scheduler = p->scheduler;
  static_cast<TileScheduler&>(scheduler) = p->Base::scheduler;
  const Broadcast& bias = problem.dense.bias_shape;
  const bool sequences_share = p->dense.has_bias && p->dense.sequences_of_bias > 1;
  const bool heads_share = p->dense.has_bias && bias.heads == 1;
  scheduler.batch_innermost = sequences_share;
  if (sequences_share || heads_share) {
    const std::int64_t sharing = (sequences_share ? problem.shape.batch : 1) *
                                 (heads_share ? scheduler.num_heads : 1);
    scheduler.heads_per_group =
        static_cast<int>(sharing < kMostTogether ? sharing : kMostTogether);
  }
  return {};
}

// What of a range of tiles is visited.
struct TileList : TileRange {
  int num_cut = 0;   // have to ask the mask
  int num_full = 0;  // all rows see all keys

  CUTE_DEVICE bool empty() const { return num_cut + num_full == 0; }
};

enum class Visit { kNone, kCut, kFull };

// Of tile `n` of a range of key tiles.
template <int kRows, int kKeys>
CUTE_DEVICE Visit visit_of(const DenseMask& mask, const TileRange& range, int row, int n) {
  const TileClass seen = mask.classify(row, kRows, n * kKeys, kKeys);
  if (!seen.any) return Visit::kNone;
  return range.cuts(n) || !seen.all ? Visit::kCut : Visit::kFull;
}

// The key tiles of kRows rows from `row`, right to left: the cut ones, then the full ones.
template <int kRows, int kKeys>
struct KeyWalk {
  DenseMask mask;
  TileRange range;
  int row;
  Visit pass = Visit::kCut;
  int n;

  CUTE_DEVICE KeyWalk(const DenseMask& mask, const TileRange& range, int row)
      : mask(mask), range(range), row(row), n(range.end) {}

  // False: that was the last one.
  CUTE_DEVICE bool next() {
    while (true) {
      if (--n < range.begin) {
        if (pass == Visit::kFull) return false;
        pass = Visit::kFull;
        n = range.end;
        continue;
      }
      if (visit_of<kRows, kKeys>(mask, range, row, n) == pass) return true;
    }
  }
};

// range_of of the kernels whose tiles are blocks of queries.
template <class T>
CUTE_DEVICE TileList listed_keys(const typename T::Params& p, const Work& work,
                                 const Intervals& intervals, int) {
  const WorkTile& tile = work.tile;
  const int row = tile.block * T::kBlockM;
  TileList list;
  static_cast<TileRange&>(list) = visible_keys<T>(p, work, intervals, 0);
  const DenseMask mask = p.dense.mask_of(tile.batch, tile.head);
  CUTE_NO_UNROLL
  for (int n = list.begin; n < list.end; ++n) {
    const Visit visit = visit_of<T::kBlockM, T::kBlockN>(mask, list, row, n);
    list.num_cut += visit == Visit::kCut;
    list.num_full += visit == Visit::kFull;
  }
  return list;
}

}  // namespace jax_fa3
