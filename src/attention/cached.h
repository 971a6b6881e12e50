// What a sequence's query rows see of a cache, as integer geometry. Row i of a sequence stands at
// position offset + i, and sees slot j when
//   i < seen_rows, key_begin <= j < key_end, offset + i - left <= j <= offset + i + right.
//
// The rows of one kv head's query heads are packed: packed row i * G + g is row i of the kv head's
// g-th query head. `block_rows` packed rows in order are a block, which a kernel works on as a
// whole. Pure arithmetic for host and device.
#pragma once

#include "attention/divisor.h"
#include "attention/mask.h"
#include "call/cache.h"

namespace jax_fa3 {

// [begin, end)
struct Range {
  int begin = 0;
  int end = 0;

  JFA_HD bool empty() const { return begin >= end; }
  JFA_HD int size() const { return empty() ? 0 : end - begin; }
  JFA_HD Range intersect(const Range& other) const {
    return {max_of(begin, other.begin), min_of(end, other.end)};
  }
};

// What some rows see: any of them, and all of them.
struct SeenKeys {
  Range any;
  Range all;

  // In tiles of `tile_keys` keys.
  JFA_HD Range tiles(int tile_keys) const {
    if (any.empty()) return {};
    return {any.begin / tile_keys, ceil_div(any.end, tile_keys)};
  }
  // Whether a tile has keys that some row does not see.
  JFA_HD bool cuts(int tile, int tile_keys) const {
    return tile * tile_keys < all.begin || (tile + 1) * tile_keys > all.end;
  }
  // The tiles among `some` that have to be visited, and which of them need no mask.
  JFA_HD TileRange visit(const Range& some, int tile_keys) const {
    const Range seen = tiles(tile_keys).intersect(some);
    if (seen.empty()) return {};
    const int full_end = clamp_to(all.end / tile_keys, seen.begin, seen.end);
    const int full_begin = ceil_div(max_of(all.begin, 0), tile_keys);
    return {seen.begin, clamp_to(full_begin, seen.begin, full_end), full_end, seen.end};
  }
};

struct CachedSequence {
  int first_token;  // of its query rows
  int rows;         // that it owns
  int seen_rows;    // the first of them, those that are not padding
  int offset;
  int key_begin;
  int key_end;
};

// What is the same for all sequences of a call.
struct CachedExtents {
  int batch;
  int tokens;
  int rows_per_sequence;  // without query_starts
  Divisor heads_per_kv_head;
  int capacity;
  int window_left;
  int window_right;
  Divisor block_rows;

  // Packed rows of a sequence, and their blocks.
  JFA_HD int packed_rows(int rows) const { return rows * heads_per_kv_head; }
  JFA_HD int blocks(int rows) const { return (packed_rows(rows) + block_rows - 1) / block_rows; }

  JFA_HD Range row_keys(const CachedSequence& sequence, int row) const {
    if (row >= sequence.seen_rows) return {};
    const int position = sequence.offset + row;
    return {max_of(sequence.key_begin, position - window_left),
            min_of(sequence.key_end, position + window_right + 1)};
  }
  // Of rows [first, last].
  JFA_HD SeenKeys seen_keys(const CachedSequence& sequence, int first, int last) const {
    last = min_of(last, sequence.seen_rows - 1);
    if (first > last) return {};
    const Range of_first = row_keys(sequence, first), of_last = row_keys(sequence, last);
    const Range any{of_first.begin, of_last.end};
    if (any.empty()) return {};
    return {any, {of_last.begin, of_first.end}};
  }
  JFA_HD SeenKeys seen_by_sequence(const CachedSequence& sequence) const {
    return seen_keys(sequence, 0, sequence.rows - 1);
  }
  // Of the packed rows [first, end).
  JFA_HD SeenKeys seen_by_packed(const CachedSequence& sequence, int first, int end) const {
    return seen_keys(sequence, first / heads_per_kv_head, (end - 1) / heads_per_kv_head);
  }
};

// What the index arrays have for sequence `b`, as it is. Apart from what its rows follow from, so
// that all of it is on its way at one time.
struct SequenceEntries {
  int key_length = 0;
  int query_offset = 0;
  int query_length = kUnbounded;
  int key_start = 0;

  SequenceEntries() = default;
  JFA_HD SequenceEntries(const CachedIndex& index, int b)
      : key_length(index.key_lengths[b]),
        query_offset(index.query_offset[b]),
        query_length(index.query_lengths ? index.query_lengths[b] : kUnbounded),
        key_start(index.key_starts ? index.key_starts[b] : 0) {}
};

// The sequence whose rows are [first_token, first_token + rows). Its entries are clamped here.
JFA_HD inline CachedSequence make_sequence(const SequenceEntries& entries,
                                           const CachedExtents& extents, int first_token,
                                           int rows) {
  CachedSequence s;
  s.first_token = first_token;
  s.rows = rows;
  s.seen_rows = clamp_to(entries.query_length, 0, rows);
  s.offset = clamp_to(entries.query_offset, -kMaxSeqlen, kMaxSeqlen);
  s.key_end = clamp_to(entries.key_length, 0, extents.capacity);
  s.key_begin = clamp_to(entries.key_start, 0, s.key_end);
  return s;
}

// Where sequence b's rows begin, of arrays with query_starts; a start before its predecessor's is
// moved to there. Two of sequence b in a row are its rows.
JFA_HD inline int read_start(const CachedIndex& index, const CachedExtents& extents, int b) {
  return clamp_to(index.query_starts[b], 0, extents.tokens);
}

}  // namespace jax_fa3
