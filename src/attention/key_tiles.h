// The work tiles of the backward pass along the keys of a packed sequence.
//
// On a fixed grid of keys the tile in which a document begins walks all rows of that document for a
// part of its keys. So tiles begin anew where a long document does: of a short one, the tile more
// costs what the fewer rows save. A list has the tiles of one sequence, for all of its heads, and
// what bounds the rows that see them.
//
// Pure arithmetic for host and device. Whatever a table says, the tiles of a list are disjoint and
// cover all keys.
#pragma once

#include <cstdint>

#include "attention/mask.h"

namespace jax_fa3 {

constexpr int kLongDocument = 1024;  // keys

// Whether a document begins with the second of two neighbouring keys: no row sees both. Keys that
// nobody sees are a document, too.
JFA_HD constexpr bool is_edge(const Interval& before, const Interval& rows) {
  const bool seen = rows.begin < rows.end;
  if ((before.begin < before.end) != seen) return true;
  return seen && before.end <= rows.begin;
}

// Keys [begin, end) of a work tile, and bounds of the rows that see them, where all heads share
// these.
struct alignas(16) KeyTile {
  std::int32_t begin;
  std::int32_t end;
  std::int32_t is_inside;  // of a long document
  std::int32_t is_bounded;
  Bounds seen_by;
};

// A list, which is made from front to back, by one thread or by several that do the same, and then
// given bounds. Before its tiles it has their number; behind them it is filled up with tiles
// without keys.
class KeyTileList {
 public:
  // Each long document may add a tile to those of the grid.
  JFA_HD static constexpr std::int64_t most_tiles(std::int64_t seqlen_k, int block_n) {
    return ceil_div<std::int64_t>(seqlen_k, block_n) + seqlen_k / kLongDocument;
  }
  // KeyTiles in memory.
  JFA_HD static constexpr std::int64_t size(std::int64_t seqlen_k, int block_n) {
    return 1 + most_tiles(seqlen_k, block_n);
  }
  JFA_HD static std::int32_t num_tiles(const KeyTile* list) { return list[0].begin; }
  JFA_HD static const KeyTile& tile(const KeyTile* list, int number) { return list[1 + number]; }

  JFA_HD KeyTileList(KeyTile* list, int block_n, const Intervals& intervals,
                     const PlaneLayout& layout, int thread = 0, int num_threads = 1)
      : list_(list),
        block_n_(block_n),
        intervals_(intervals),
        layout_(layout),
        thread_(thread),
        num_threads_(num_threads) {}

  // An edge at which a long document ends, or begins, or both.
  JFA_HD void add_edge(int key, bool ends, bool begins) {
    if (ends) document_end_ = min_of(document_end_, key);
    if (!begins) return;
    add_tiles(key);
    first_ = key;
    document_end_ = kNone;
  }
  JFA_HD void finish() {
    const int seqlen_k = layout_.seqlen_k;
    document_end_ = min_of(document_end_, seqlen_k);
    add_tiles(seqlen_k);
    if (thread_ == 0) list_[0] = {count_, 0, 0, 0, {}};
    const auto most = static_cast<int>(most_tiles(seqlen_k, block_n_));
    for (int i = count_ + thread_; i < most; i += num_threads_) {
      list_[1 + i] = {seqlen_k, seqlen_k, 0, 0, {}};
    }
  }
  // When all threads have finished. All at once: for each tile by itself, all would wait for
  // memory.
  JFA_HD void add_bounds() {
    if (intervals_.plane_stride != 0) return;
    for (int i = thread_; i < count_; i += num_threads_) {
      KeyTile& tile = list_[1 + i];
      tile.is_bounded = 1;
      tile.seen_by = bounds_of(tile);
    }
  }

 private:
  KeyTile* list_;
  int block_n_;
  const Intervals& intervals_;
  PlaneLayout layout_;
  int thread_, num_threads_;
  int count_ = 0;
  int first_ = 0;         // of the tiles that are added next
  int document_end_ = 0;  // of the long document that begins there, as far as that is known

  JFA_HD void add_tiles(int end) {
    const int added = ceil_div(end - first_, block_n_);
    for (int i = thread_; i < added; i += num_threads_) {
      const int begin = first_ + i * block_n_;
      const int tile_end = min_of(begin + block_n_, end);
      list_[1 + count_ + i] = {begin, tile_end, tile_end <= document_end_, 0, {}};
    }
    count_ += added;
  }
  // Inside of a document the first and the last key bound what all between are seen by.
  JFA_HD Bounds bounds_of(const KeyTile& tile) const {
    if (!tile.is_inside) return intervals_.of_keys(layout_, tile.begin, tile.end, 1);
    const Interval first = intervals_.keys[tile.begin], last = intervals_.keys[tile.end - 1];
    return {first.begin, last.begin, first.end, last.end};
  }
};

}  // namespace jax_fa3
