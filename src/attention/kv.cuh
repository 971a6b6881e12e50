// Where a producer gets the tiles of key and value from. A kernel's Source is one of these
// policies, and its parameters have the tensor maps `key` and `value`. One thread calls them, or a
// warp where it says so; the bytes of a tile complete on `full`.
#pragma once

#include "attention/pages.h"
#include "device/tma.cuh"

namespace jax_fa3 {

// Dense arrays: key [b, s_k, h_kv, d], value [b, s_k, h_kv, d_v].
template <class KTile, class VTile>
struct Contiguous {
  // The tile whose first row is `row`.
  template <class Params>
  CUTE_DEVICE static void load_key(const Params& p, TransactionBarrier& full,
                                   typename KTile::Element* smem, int row, int head, int batch) {
    load_tile<KTile>(p.key, full, kEvictLast, smem, row, head, batch);
  }
  template <class Params>
  CUTE_DEVICE static void load_value(const Params& p, TransactionBarrier& full,
                                     typename VTile::Element* smem, int row, int head, int batch) {
    load_tile<VTile>(p.value, full, kEvictLast, smem, row, head, batch);
  }
};

// The same with value prepared (prepared_value.h): [b, h_kv, d_v, padded keys].
template <class KTile, class VTile>
struct ContiguousPrepared : Contiguous<KTile, VTile> {
  template <class Params>
  CUTE_DEVICE static void load_value(const Params& p, TransactionBarrier& full,
                                     typename VTile::Element* smem, int row, int head, int batch) {
    load_plane<VTile>(p.value, full, kEvictLast, smem, 0, row, head, batch);
  }
};

// Pages of a cache, whose maps have boxes of `p.box_rows` slots: the tiles of one sequence, right
// to left. A warp, of which a lane loads a box of a chunk; its lanes look up the boxes of 32 /
// (boxes of a tile) tiles at a time, and those of the tiles after them ahead.
template <class KTile, class VTile>
struct Paged {
  static constexpr int kTileKeys = KTile::kRows;
  static_assert(VTile::kRows == kTileKeys);
  static constexpr int kMostBoxes = kTileKeys / kLeastBoxRows;  // of a tile
  static_assert(kMostBoxes * KTile::kChunks <= 32 && kMostBoxes * VTile::kChunks <= 32,
                "a lane has a box of a chunk");

  // Tiles from `tile` on downwards, of which some row sees the keys `seen`.
  template <class Params>
  CUTE_DEVICE Paged(const Params& p, int batch, const Range& seen, int tile)
      : pages_(p.pages), rows_(p.box_rows), batch_(batch), seen_(seen), tile_(tile) {
    box_bits_ = __ffs(kTileKeys) - __ffs(rows_);
    ahead_ = look_up();
  }

  // Where this lane's box of the next tile is.
  CUTE_DEVICE Slot next() {
    const int at_once = 32 >> box_bits_, ahead = taken_ & (at_once - 1);
    if (ahead == 0) found_ = ahead_;
    if (ahead == (at_once > 1 ? 1 : 0)) {  // not before the first tile, if that can be
      tile_ -= at_once;
      ahead_ = look_up();
    }
    const int source = (ahead << box_bits_) + box();
    ++taken_;
    return {__shfl_sync(0xffffffff, found_.page, source),
            __shfl_sync(0xffffffff, found_.slot, source)};
  }

  template <class Params>
  CUTE_DEVICE void load_key(const Params& p, TransactionBarrier& full,
                            typename KTile::Element* smem, int head, const Slot& place) const {
    load<KTile>(p.key, full, smem, head, place);
  }
  template <class Params>
  CUTE_DEVICE void load_value(const Params& p, TransactionBarrier& full,
                              typename VTile::Element* smem, int head, const Slot& place) const {
    load<VTile>(p.value, full, smem, head, place);
  }

 private:
  // This lane's box of its tile; which of the tiles looked up at a time, or which chunk, is above.
  CUTE_DEVICE int box() const { return threadIdx.x % 32 & ((1 << box_bits_) - 1); }
  CUTE_DEVICE int above() const { return threadIdx.x % 32 >> box_bits_; }

  CUTE_DEVICE Slot look_up() const {
    const int key = (tile_ - above()) * kTileKeys + box() * rows_;
    return pages_.find(batch_, key, rows_, seen_);
  }
  template <class Tile>
  CUTE_DEVICE void load(const CUtensorMap& map, TransactionBarrier& full,
                        typename Tile::Element* smem, int head, const Slot& place) const {
    const int chunk = above();
    if (chunk >= Tile::kChunks) return;
    load_chunk<Tile>(map, full, kEvictLast, smem, box() * rows_, chunk, place.slot, head,
                     place.page);
  }

  const Pages& pages_;
  int rows_;      // of a box
  int box_bits_;  // a tile has 2 to that power
  int batch_;
  Range seen_;
  int tile_;       // the first of those looked up ahead
  int taken_ = 0;  // tiles
  Slot found_, ahead_;
};

}  // namespace jax_fa3
