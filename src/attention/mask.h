// The mask as integer geometry: which keys a query row sees, which tiles must be visited, and
// which of those straddle an edge. Row i of a sequence sees key j when
//   i < query_length, j < key_length and i + first <= j <= i + last
// and, where the call has row intervals, j is in row i's. Causal attention, sliding windows,
// offsets and lengths are all values of these four numbers; what intervals add comes as Bounds of
// 64 rows or keys at a time. Pure arithmetic for host and device; only mask.cuh knows registers.
#pragma once

#include "attention/visibility.h"
#include "call/problem.h"

namespace jax_fa3 {

JFA_HD constexpr int min_of(int a, int b) { return a < b ? a : b; }
JFA_HD constexpr int max_of(int a, int b) { return a > b ? a : b; }

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

  // Tiles of `block_n` keys that rows [row_begin, row_end) look at; `seen` bounds their intervals.
  JFA_HD TileRange key_tiles(int row_begin, int row_end, int block_n,
                             const Bounds& seen = {}) const {
    row_end = min_of(row_end, query_length);
    const int key_begin = max_of(row_begin + first, max_of(seen.least_begin, 0));
    const int key_end = min_of(row_end + last, min_of(seen.greatest_end, key_length));
    if (row_begin >= row_end || key_begin >= key_end) return {};
    const int all_see_begin = max_of(row_end - 1 + first, seen.greatest_begin);  // inclusive
    const int all_see_end =
        min_of(row_begin + last + 1, min_of(seen.least_end, key_length));  // exclusive
    return tiles(key_begin, all_see_begin, all_see_end, key_end, block_n);
  }

  // Tiles of `block_m` rows that look at keys [key_begin, key_end); `seen` bounds the rows that see
  // these keys.
  JFA_HD TileRange query_tiles(int key_begin, int key_end, int block_m,
                               const Bounds& seen = {}) const {
    const bool ragged = key_end > key_length;
    key_end = min_of(key_end, key_length);
    const int row_begin = max_of(key_begin - last, max_of(seen.least_begin, 0));
    const int row_end = min_of(key_end - first, min_of(seen.greatest_end, query_length));
    if (key_begin >= key_end || row_begin >= row_end) return {};
    const int see_all_begin = max_of(key_end - 1 - last, seen.greatest_begin);
    const int see_all_end = ragged ? 0 : min_of(key_begin - first + 1, seen.least_end);
    return tiles(row_begin, see_all_begin, see_all_end, row_end, block_m);
  }

 private:
  JFA_HD static TileRange tiles(int begin, int full_begin, int full_end, int end, int block) {
    full_begin = min_of(max_of(full_begin, 0), kMaxSeqlen);
    full_end = max_of(full_end, 0);
    TileRange range;
    range.begin = begin / block;
    range.end = ceil_div(end, block);
    range.full_end = max_of(range.begin, min_of(full_end / block, range.end));
    range.full_begin = max_of(range.begin, min_of(ceil_div(full_begin, block), range.full_end));
    return range;
  }
};

JFA_HD constexpr int clamp_to(int value, int low, int high) {
  return max_of(low, min_of(value, high));
}

// The query heads of a work tile: those of a kv head, or one.
struct QueryHeads {
  int first = 0;
  int count = 1;
};

// The mask of sequence `b`, its row intervals apart. What the index arrays have for each sequence
// is read here and nowhere else, and clamped.
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

// The row intervals of a work tile. Where its query heads have planes of their own, the pointers
// are into the first one.
struct Intervals {
  const Plane* plane = nullptr;    // null: every row may see every key
  const Interval* keys = nullptr;  // null: what sees a key is no interval
  int plane_stride = 0;            // words from a head's plane to the next one's
  int is_valid = 1;                // else the results are NaN

  JFA_HD const Interval* rows() const { return reinterpret_cast<const Interval*>(plane + 1); }

  // Bounds of what rows, or keys, [begin, end) see, of all of the tile's query heads.
  JFA_HD Bounds of_rows(const PlaneLayout& layout, int begin, int end) const {
    return bounds(layout.row_bounds(), layout.seqlen_q, begin, end, 1);
  }
  JFA_HD Bounds of_keys(const PlaneLayout& layout, int begin, int end, int num_heads) const {
    return bounds(layout.key_bounds(), layout.seqlen_k, begin, end, num_heads);
  }

 private:
  JFA_HD Bounds bounds(int word, int seqlen, int begin, int end, int num_heads) const {
    if (plane == nullptr) return {};
    Bounds all = Bounds::none();
    const auto* words = reinterpret_cast<const std::int32_t*>(plane) + word;
    const int last = (min_of(end, seqlen) - 1) / kBoundsRows;
    JFA_ROLLED
    for (int head = plane_stride == 0 ? 1 : num_heads; head > 0; --head) {
      JFA_ROLLED
      for (int group = begin / kBoundsRows; group <= last; ++group) {
        all.add(reinterpret_cast<const Bounds*>(words)[group]);
      }
      words += plane_stride;
    }
    return all;
  }
};

// The intervals of some query heads of sequence `b`, if the call has any; then the lengths of its
// mask end where they do.
JFA_HD inline void read_intervals(Intervals& intervals, Mask& mask, const IndexArrays& index, int b,
                                  const QueryHeads& heads, const PlaneLayout& layout) {
  intervals = {};
  if (index.visibility == nullptr) return;
  intervals.plane_stride = static_cast<int>(index.visibility_head_stride);
  const auto* const words = index.visibility + b * index.visibility_batch_stride +
                            heads.first * index.visibility_head_stride;
  intervals.plane = reinterpret_cast<const Plane*>(words);
  Plane all{Plane::kValid | Plane::kMonotone, 0, 0, 0};
  const auto* summary = words;
  JFA_ROLLED
  for (int head = intervals.plane_stride == 0 ? 1 : heads.count; head > 0; --head) {
    all.add(*reinterpret_cast<const Plane*>(summary));
    summary += intervals.plane_stride;
  }
  mask.query_length = clamp_to(all.rows_end, 0, mask.query_length);
  mask.key_length = clamp_to(all.keys_end, 0, mask.key_length);
  intervals.is_valid = all.flags & Plane::kValid;
  if (all.flags & Plane::kMonotone) {
    intervals.keys = PlaneView<const std::int32_t>{words, layout}.keys();
  }
}

}  // namespace jax_fa3
