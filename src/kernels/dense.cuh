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
  int bias_bytes;           // of a tile as it is loaded; 0 without a bias
  int bias_row_mask;        // kSharedBiasRows - 1 where all rows share theirs, else kEveryRow
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
  const bool has_blocks = problem.function.blocks != nullptr;  // classes alone, of a mask
  const Broadcast& bias = dense.bias_shape;
  const Broadcast& mask = has_blocks ? problem.function.blocks_shape : dense.mask_shape;
  const DenseMaskLayout layout{static_cast<int>(mask.rows), static_cast<int>(s.seqlen_k)};
  const bool shares_bias = bias.sequences < s.batch || bias.heads < s.num_heads_q;
  const std::int64_t words = has_blocks ? layout.bits() : layout.words();
  const std::int32_t* const table = has_blocks ? problem.function.blocks : dense.mask;
  DenseParams p;
  p.has_bias = dense.bias != nullptr;
  p.bias_bytes = 0;
  p.bias_row_mask = kEveryRow;
  p.has_mask = table != nullptr;
  p.bias_factor = 1.f / problem.softmax_scale;
  p.sequences_of_bias = static_cast<int>(s.batch / bias.sequences);
  p.bias_hint = shares_bias ? kEvictLast : kEvictFirst;
  p.mask = reinterpret_cast<const std::uint32_t*>(table);
  p.sequences_of_mask = static_cast<int>(s.batch / mask.sequences);
  p.mask_sequence_stride = mask.heads * words;
  p.mask_head_stride = mask.heads > 1 ? words : 0;
  p.mask_layout = layout;
  return p;
}

// The map of a bias, in boxes of `box_rows`, by (sequence plane, head, row, key); where heads or
// rows share values their strides are 0.
template <class Tile>
Status make_bias_map(CUtensorMap* map, const CallProblem& problem, int box_rows = Tile::kRows) {
  const Shape& s = problem.shape;
  const Broadcast& bias = problem.dense.bias_shape;
  const std::int64_t keys = padded_bias_keys(s.seqlen_k);
  const std::int64_t strides[3] = {bias.rows > 1 ? keys : 0, bias.heads > 1 ? bias.rows * keys : 0,
                                   bias.heads * bias.rows * keys};
  return encode_tensor_map<Tile>(map, problem.dense.bias,
                                 {keys, s.seqlen_q, s.num_heads_q, bias.sequences}, strides,
                                 {Tile::kChunkCols, static_cast<cuuint32_t>(box_rows), 1, 1});
}

// Work tiles in an order that has those at work share a bias: with `batch_innermost`, sequences of
// one head go together.
template <class Scheduler>
struct DenseScheduler : Scheduler {
  bool batch_innermost;

  CUTE_DEVICE WorkTile tile(int index) const {
    WorkTile tile = Scheduler::tile(index);
    if (batch_innermost) {
      const int batch_head = tile.batch * this->num_heads + tile.head;
      const int batch = this->num_batch_heads / this->num_heads;
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
  using Scheduler = decltype(Params::scheduler);

  CUtensorMap bias;
  DenseParams dense;
  DenseScheduler<Scheduler> scheduler;  // in place of the one in Params
};

// What a kernel with a BiasTile of Traits is launched with, beside what all kernels of its
// direction are, which is already there, the scheduler too. Sequences or heads that share a bias go
// together, so that L2 has its tiles.
template <class Traits, class Params>
Status set_dense(Params* p, const CallProblem& problem) {
  using BiasTile = typename Traits::BiasTile;
  constexpr std::int64_t kMostTogether = 64;
  p->dense = dense_params(problem);
  if (p->dense.has_bias) {
    // A row that all share is loaded for one matrix' rows alone: for all of a tile's, every CTA
    // would read the same line as often, and the slice of L2 that has it answers one after the
    // other.
    const bool rows_share = problem.dense.bias_shape.rows == 1;
    const int rows = rows_share ? kSharedBiasRows : BiasTile::kRows;
    p->dense.bias_row_mask = rows_share ? kSharedBiasRows - 1 : kEveryRow;
    p->dense.bias_bytes = rows * BiasTile::kCols * int(sizeof(typename BiasTile::Element));
    JFA_CHECK_OK(make_bias_map<BiasTile>(&p->bias, problem, rows));
  }
  auto& scheduler = p->scheduler;
  static_cast<typename Params::Scheduler&>(scheduler) = p->Base::scheduler;
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
  TileClass seen;
  if constexpr (kRows <= 2 * kMaskBlockRows) {
    seen = mask.classify<kRows>(row, n * kKeys, kKeys);
  } else {  // beside three consumers a thread has no registers for all their words
    seen = mask.classify(row, kRows, n * kKeys, kKeys);
  }
  if (!seen.any) return Visit::kNone;
  return range.cuts(n) || !seen.all ? Visit::kCut : Visit::kFull;
}

// How many tiles a walk visits of either kind.
struct TileCounts {
  int cut = 0;
  int full = 0;

  CUTE_DEVICE bool empty() const { return cut + full == 0; }
};

// A walk through a list of tiles, of which a mask lets some be visited. A warp walks together, and
// each lane looks at an entry of its own, so that all wait for memory at once. The list is in
// shared memory, because the threads that walk have few registers; it has num_entries() and
// look(i).
template <class List>
class ListWalk {
 public:
  int entry = 0;  // the one at hand
  bool is_cut = false;

  CUTE_DEVICE explicit ListWalk(const List& list) : list_(list) {}

  // Of all entries, before the first next(), which finds the first 32 at hand: they come last. A
  // look counts 32 of them: one by one they would keep the producer from a work tile's first loads
  // until its consumers have nothing left.
  CUTE_DEVICE TileCounts count() {
    TileCounts counts;
    first_ = (list_.num_entries() - 1) / kLanes * kLanes;
    for (; first_ >= 0; first_ -= kLanes) {
      look();
      counts.cut += __popc(cut_);
      counts.full += __popc(full_);
    }
    return counts;
  }

  // What has been looked at last is not looked at again: of most lists that is all.
  CUTE_DEVICE void restart() {
    first_ = -kLanes;
    left_ = 0;
  }

  // The next entry of those that are cut, or full, or either. False: there is none.
  CUTE_DEVICE bool next(bool cut, bool full) {
    while (left_ == 0) {
      if (first_ + kLanes >= list_.num_entries()) return false;
      first_ += kLanes;
      look();
      left_ = (cut ? cut_ : 0) | (full ? full_ : 0);
    }
    const int lane = __ffs(left_) - 1;
    entry = first_ + lane;
    is_cut = cut_ >> lane & 1;
    left_ &= left_ - 1;
    return true;
  }
  CUTE_DEVICE bool next() { return next(true, true); }

 private:
  static constexpr int kLanes = 32;

  CUTE_DEVICE void look() {
    if (seen_ == first_) return;
    seen_ = first_;
    const int entry = first_ + int(threadIdx.x) % kLanes;
    const Visit visit = entry < list_.num_entries() ? list_.look(entry) : Visit::kNone;
    cut_ = __ballot_sync(0xffffffff, visit == Visit::kCut);
    full_ = __ballot_sync(0xffffffff, visit == Visit::kFull);
  }

  const List& list_;
  int first_ = -kLanes;  // of the entries at hand
  int seen_ = -kLanes;   // of the entries that have been looked at last
  unsigned cut_ = 0, full_ = 0;
  unsigned left_ = 0;  // to be visited
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
};

// Those that are visited: the cut ones, then the full ones.
template <class Tiles>
class KeyWalk {
 public:
  int n;  // the tile at hand

  CUTE_DEVICE explicit KeyWalk(const Tiles& tiles) : tiles_(tiles), walk_(tiles) {}

  // Before the first next().
  CUTE_DEVICE TileCounts count() { return walk_.count(); }

  // False: that was the last one.
  CUTE_DEVICE bool next() {
    while (!walk_.next(!is_full_, is_full_)) {
      if (is_full_) return false;
      is_full_ = true;
      walk_.restart();
    }
    n = tiles_.tile(walk_.entry);
    return true;
  }

 private:
  const Tiles& tiles_;
  ListWalk<Tiles> walk_;
  bool is_full_ = false;
};

}  // namespace jax_fa3
