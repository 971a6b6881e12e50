// The mask as integer geometry: which keys a query row sees, which tiles must be visited, and
// which of those straddle an edge. Row i of a sequence sees key j when
//   i < query_length, j < key_length and i + first <= j <= i + last.
// Causal attention, sliding windows, offsets and lengths are all values of these four numbers.
// Pure arithmetic for host and device; only mask.cuh knows registers.
#pragma once

#include "call/problem.h"

namespace jax_fa3 {

// Tiles [begin, end) must be visited; of these [full_begin, full_end) need no mask.
struct TileRange {
  int begin = 0;
  int full_begin = 0;
  int full_end = 0;
  int end = 0;

  JFA_HD bool empty() const { return begin >= end; }
  JFA_HD bool cuts(int tile) const { return tile < full_begin || tile >= full_end; }
};

struct Mask {
  int query_length;  // rows of this sequence that exist
  int key_length;    // keys of this sequence that exist
  int first;         // leftmost visible key, relative to the row
  int last;          // rightmost visible key, relative to the row

  JFA_HD bool keeps(int row, int key) const {
    return row < query_length && key < key_length && key >= row + first && key <= row + last;
  }

  // Tiles of `block_n` keys that rows [row_begin, row_end) look at.
  JFA_HD TileRange key_tiles(int row_begin, int row_end, int block_n) const {
    row_end = min_of(row_end, query_length);
    const int key_begin = max_of(row_begin + first, 0);
    const int key_end = min_of(row_end + last, key_length);
    if (row_begin >= row_end || key_begin >= key_end) return {};
    const int all_see_begin = max_of(row_end - 1 + first, 0);                     // inclusive
    const int all_see_end = max_of(min_of(row_begin + last + 1, key_length), 0);  // exclusive
    return tiles(key_begin, all_see_begin, all_see_end, key_end, block_n);
  }

  // Tiles of `block_m` rows that look at keys [key_begin, key_end).
  JFA_HD TileRange query_tiles(int key_begin, int key_end, int block_m) const {
    const bool ragged = key_end > key_length;
    key_end = min_of(key_end, key_length);
    const int row_begin = max_of(key_begin - last, 0);
    const int row_end = min_of(key_end - first, query_length);
    if (key_begin >= key_end || row_begin >= row_end) return {};
    const int see_all_begin = max_of(key_end - 1 - last, 0);
    const int see_all_end = ragged ? 0 : max_of(key_begin - first + 1, 0);
    return tiles(row_begin, see_all_begin, see_all_end, row_end, block_m);
  }

 private:
  JFA_HD static int min_of(int a, int b) { return a < b ? a : b; }
  JFA_HD static int max_of(int a, int b) { return a > b ? a : b; }

  JFA_HD static TileRange tiles(int begin, int full_begin, int full_end, int end, int block) {
    TileRange range;
    range.begin = begin / block;
    range.end = ceil_div(end, block);
    range.full_end = max_of(range.begin, min_of(full_end / block, range.end));
    range.full_begin = max_of(range.begin, min_of(ceil_div(full_begin, block), range.full_end));
    return range;
  }
};

JFA_HD inline int clamp_to(int value, int low, int high) {
  return value < low ? low : value > high ? high : value;
}

// The mask of sequence `b`; index arrays are read here and nowhere else, and clamped.
JFA_HD inline Mask make_mask(const MaskOptions& options, const IndexArrays& index, int b,
                             int seqlen_q, int seqlen_k) {
  const int offset = clamp_to(index.query_offset ? index.query_offset[b] : options.query_offset,
                              -kMaxSeqlen, kMaxSeqlen);
  Mask mask;
  mask.query_length =
      index.query_lengths ? clamp_to(index.query_lengths[b], 0, seqlen_q) : seqlen_q;
  mask.key_length = index.key_lengths ? clamp_to(index.key_lengths[b], 0, seqlen_k) : seqlen_k;
  mask.first = offset - options.window_left;
  mask.last = offset + options.window_right;
  return mask;
}

}  // namespace jax_fa3
