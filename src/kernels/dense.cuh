// Dense bias and dense masks, as the kernels that take them are launched with them, and which tiles
// those kernels visit.
//
// Their work tiles do not visit a range but what of it the mask lets them see: first the tiles that
// have to ask the mask, then those that every row sees whole. The producer walks them, and says how
// many there are with the queries, and with each stage which tile it holds.
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

// What a kernel with a BiasTile of Traits is launched with, beside what all kernels of its
// direction are, which is already there. Sequences or heads that share a bias go together, so that
// L2 has its tiles.
template <class Traits, class Params>
Status set_dense(Params* p, const CallProblem& problem, const void* some_address) {
  constexpr std::int64_t kMostTogether = 64;
  if constexpr (Traits::kTakesBias) {
    JFA_CHECK_OK(make_bias_map<typename Traits::BiasTile>(&p->bias, problem, some_address));
  }
  p->dense = dense_params(problem);
  DenseScheduler& scheduler = p->scheduler;
  static_cast<TileScheduler&>(scheduler) = p->Base::scheduler;
  const Broadcast& bias = problem.dense.bias_shape;
  const bool sequences_share = p->dense.has_bias && p->dense.sequences_of_bias > 1;
  const bool heads_share = p->dense.has_bias && bias.heads == 1;
  scheduler.batch_innermost = sequences_share;
  if (sequences_share || heads_share) {
    const std::int64_t sharing =
        (sequences_share ? problem.shape.batch : 1) * (heads_share ? scheduler.num_heads : 1);
    scheduler.heads_per_group = static_cast<int>(sharing < kMostTogether ? sharing : kMostTogether);
  }
  return {};
}

enum class Visit { kNone, kCut, kFull };

// Of tile `n` of a range of key tiles.
template <int kRows, int kKeys>
CUTE_DEVICE Visit visit_of(const DenseMask& mask, const TileRange& range, int row, int n) {
  const TileClass seen = mask.classify(row, kRows, n * kKeys, kKeys);
  if (!seen.any) return Visit::kNone;
  return range.cuts(n) || !seen.all ? Visit::kCut : Visit::kFull;
}

// A walk through a list of tiles, of which a mask lets some be visited. A warp walks together, and
// each lane looks at an entry of its own, so that all wait for memory at once. The list is in shared
// memory, because the threads that walk have few registers; it has num_entries() and look(i).
template <class List>
class ListWalk {
 public:
  int entry = 0;  // the one at hand
  bool is_cut = false;

  CUTE_DEVICE explicit ListWalk(const List& list) : list_(list) {}

  CUTE_DEVICE void restart() { first_ = -kLanes; }

  // The next entry that is wanted(visit). False: there is none.
  template <class Wanted>
  CUTE_DEVICE bool next(const Wanted& wanted) {
    while (left_ == 0) {
      if (first_ + kLanes >= list_.num_entries()) return false;
      first_ += kLanes;
      const Visit visit = look();
      left_ = __ballot_sync(0xffffffff, wanted(visit));
      cut_ = __ballot_sync(0xffffffff, visit == Visit::kCut);
    }
    const int lane = __ffs(left_) - 1;
    entry = first_ + lane;
    is_cut = cut_ >> lane & 1;
    left_ &= left_ - 1;
    return true;
  }

 private:
  static constexpr int kLanes = 32;

  CUTE_DEVICE Visit look() const {
    const int entry = first_ + int(threadIdx.x) % kLanes;
    return entry < list_.num_entries() ? list_.look(entry) : Visit::kNone;
  }

  const List& list_;
  int first_ = -kLanes;  // of the entries that the lanes have looked at
  unsigned left_ = 0;    // of these, to be visited
  unsigned cut_ = 0;
};

// How many tiles a walk visits of either kind.
struct TileCounts {
  int cut = 0;
  int full = 0;

  CUTE_DEVICE bool empty() const { return cut + full == 0; }
};

// The key tiles of some rows, right to left.
template <int kRows, int kKeys>
struct KeyTiles {
  DenseMask mask;
  TileRange range;
  int row;

  CUTE_DEVICE int num_entries() const { return range.end - range.begin; }
  CUTE_DEVICE int tile(int entry) const { return range.end - 1 - entry; }
  CUTE_DEVICE Visit look(int entry) const {
    return visit_of<kRows, kKeys>(mask, range, row, tile(entry));
  }

  // By a warp.
  CUTE_DEVICE TileCounts count() const {
    TileCounts counts;
    ListWalk walk(*this);
    while (walk.next([](Visit visit) { return visit != Visit::kNone; })) {
      ++(walk.is_cut ? counts.cut : counts.full);
    }
    return counts;
  }
};

// Those that are visited: the cut ones, then the full ones.
template <class Tiles>
class KeyWalk {
 public:
  int n;  // the tile at hand

  CUTE_DEVICE explicit KeyWalk(const Tiles& tiles) : tiles_(tiles), walk_(tiles) {}

  // False: that was the last one.
  CUTE_DEVICE bool next() {
    while (!walk_.next([&](Visit visit) { return visit == pass_; })) {
      if (pass_ == Visit::kFull) return false;
      pass_ = Visit::kFull;
      walk_.restart();
    }
    n = tiles_.tile(walk_.entry);
    return true;
  }

 private:
  const Tiles& tiles_;
  ListWalk<Tiles> walk_;
  Visit pass_ = Visit::kCut;
};

}  // namespace jax_fa3
