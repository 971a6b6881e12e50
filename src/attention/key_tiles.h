// Where the backward pass's work tiles begin in a packed sequence.
//
// On a fixed grid of keys the tile in which a document begins walks all rows of that document for a
// part of its keys. So tiles begin anew where a long document does. A list has the tiles of one
// sequence, for all of its heads: their number, for each where it begins, and where the keys end. A
// tile of the list goes up to the next one, and has block_n keys at most.
//
// Pure arithmetic for host and device. Whatever a table says, the tiles of a list are disjoint and
// cover all keys.
#pragma once

#include <cstdint>

#include "attention/mask.h"

namespace jax_fa3 {

constexpr int kLongDocument = 256;  // keys

// Whether a document begins with the second of two neighbouring keys: no row sees both. Keys that
// nobody sees are a document, too.
JFA_HD constexpr bool is_edge(const Interval& before, const Interval& rows) {
  const bool seen = rows.begin < rows.end;
  if ((before.begin < before.end) != seen) return true;
  return seen && before.end <= rows.begin;
}

// A list, which is made from front to back, by one thread or by some that do the same.
class KeyTileList {
 public:
  JFA_HD KeyTileList(int block_n, std::int32_t* words) : block_n_(block_n), words_(words) {}

  // Each long document may add a tile to those of the grid.
  JFA_HD static constexpr std::int64_t most_tiles(std::int64_t seqlen_k, int block_n) {
    return ceil_div<std::int64_t>(seqlen_k, block_n) + seqlen_k / kLongDocument;
  }
  JFA_HD static constexpr std::int64_t most_words(std::int64_t seqlen_k, int block_n) {
    return most_tiles(seqlen_k, block_n) + 2;
  }

  // An edge at which a long document ends, or begins, or both.
  JFA_HD void add_edge(int key, bool ends, bool begins, int thread = 0, int num_threads = 1) {
    if (ends) document_end_ = min_of(document_end_, key);
    if (!begins) return;
    add_tiles(key, thread, num_threads);
    first_ = key;
    document_end_ = kNone;
  }
  JFA_HD void finish(int seqlen_k, int thread = 0, int num_threads = 1) {
    document_end_ = min_of(document_end_, seqlen_k);
    add_tiles(seqlen_k, thread, num_threads);
    if (thread > 0) return;
    words_[0] = count_;
    words_[1 + count_] = seqlen_k;
  }

 private:
  int block_n_;
  std::int32_t* words_;
  int count_ = 0;
  int first_ = 0;         // of the tiles that are added next
  int document_end_ = 0;  // of the long document that begins there, as far as that is known

  JFA_HD void add_tiles(int end, int thread, int num_threads) {
    const int added = ceil_div(end - first_, block_n_);
    for (int i = thread; i < added; i += num_threads) {
      const int begin = first_ + i * block_n_;
      const bool is_inside = min_of(begin + block_n_, end) <= document_end_;
      words_[1 + count_ + i] = is_inside ? begin : ~begin;
    }
    count_ += added;
  }
};

// Keys [begin, end) of a work tile.
struct KeyTile {
  int begin;
  int end;
  bool is_inside;  // a document: what its first and last key are seen by bounds all others'

  // Tile number `block` of a list, or, without one, of the grid. False: there is no such tile.
  JFA_HD bool find(const std::int32_t* list, int block, int block_n) {
    begin = block * block_n;
    end = begin + block_n;
    is_inside = false;
    if (list == nullptr) return true;
    if (block >= list[0]) return false;
    is_inside = list[1 + block] >= 0;
    begin = position(list[1 + block]);
    end = min_of(begin + block_n, position(list[2 + block]));
    return true;
  }

  // Bounds of the rows that see the tile's keys, of all of its query heads.
  JFA_HD Bounds seen_by(const Intervals& intervals, const PlaneLayout& layout,
                        int num_heads) const {
    if (!is_inside) return intervals.of_keys(layout, begin, end, num_heads);
    const Interval first = intervals.keys[begin], last = intervals.keys[end - 1];
    return {first.begin, last.begin, first.end, last.end};
  }

 private:
  JFA_HD static int position(std::int32_t word) { return word < 0 ? ~word : word; }
};

}  // namespace jax_fa3
