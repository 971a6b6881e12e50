// What a CTA works on at a time, and where its results stand. Pure arithmetic for host and device.
#pragma once

#include "attention/splits.h"
#include "kernels/forward_cached/config.h"

namespace jax_fa3 {

// Some key tiles of an item, for one kv head.
struct Piece {
  int batch;  // -1: there are no more
  int head;   // of keys and values
  CachedSequence sequence;
  int first_row;  // packed
  int rows;       // packed rows that exist
  SeenKeys keys;  // of these rows
  Range tiles;    // of them
  Parts parts;    // of the item; this one is that of the CTA's group

  JFA_HD bool none() const { return batch < 0; }
  JFA_HD bool is_whole() const { return parts.count == 1; }

  // Where partial results of a part are, two to a CTA: an item's first part is its group's second
  // one, since the group may begin with what the group before has not finished. `number` is that of
  // the head's CTA in each group.
  JFA_HD int partial(int part, int heads_at_once, int number) const {
    const int cta = (parts.first_group + part) * heads_at_once + number;
    return 2 * cta + (part == 0 ? 1 : 0);
  }
  // What counts its parts: the first of their boundaries is no other item's.
  JFA_HD int counter(int heads_at_once, int number) const {
    return parts.first_group * heads_at_once + number;
  }
};

// Units that the line of a call has at most, whatever its lengths are: each sequence's last block
// may have few rows, and each block sees all of the capacity.
JFA_HD inline std::int64_t most_units(const CachedExtents& extents, int rounds, int tile_keys,
                                      int beside) {
  const std::int64_t blocks = extents.blocks(extents.tokens) + std::int64_t{extents.batch};
  return rounds * blocks * (ceil_div(extents.capacity, tile_keys) + beside);
}

// The item of a sequence's block, whole, in tiles of `tile_keys` keys.
JFA_HD inline Piece whole_item(const CachedExtents& extents, const CachedSequence& sequence,
                               int batch, int head, int block, int tile_keys) {
  const int first = block * extents.block_rows;
  const int rows = min_of(extents.block_rows, extents.packed_rows(sequence.rows) - first);
  const SeenKeys keys = extents.seen_by_packed(sequence, first, first + rows);
  return {batch, head, sequence, first, rows, keys, keys.tiles(tile_keys), {0, 1}};
}

// Leaves of a whole item, whose units begin at `base`, what a share [from, to) has, all but its
// parts; false: nothing.
template <class Units>
JFA_HD bool take_part(Piece& item, Portion<Units>& portion, const Shares<Units>& shares, Units base,
                      Units from, Units to) {
  const int tiles = item.tiles.size(), first = item.tiles.begin;
  const Range part = shares.tiles(base, tiles, from, to);
  if (!Shares<Units>::owns(part, base, tiles, from, to)) return false;
  item.tiles = {first + part.begin, first + part.end};
  portion = {base, tiles, part};
  return true;
}

// Where blocks have few rows, all of a sequence's take the tiles that any of its rows sees, and so
// their units need no counting. The pieces of one sequence, whose units begin at `begins`, that a
// share [from, to) has.
template <class Units>
class PiecesOfSequence {
 public:
  JFA_HD PiecesOfSequence(const CachedExtents& extents, const Shares<Units>& shares,
                          const CachedSequence& sequence, int batch, int head, Units begins,
                          Units from, Units to)
      : extents_(extents),
        shares_(shares),
        sequence_(sequence),
        batch_(batch),
        head_(head),
        tiles_(extents.seen_by_sequence(sequence).tiles(kColumnTileKeys)),
        from_(from),
        to_(to) {
    const bool has_others = from > begins && extents.blocks(sequence.rows) > 1;
    const Units before = has_others ? quotient(from - begins, Units{units()}) : 0;
    row_ = static_cast<int>(before) * extents.block_rows;
    base_ = begins + before * units();
  }

  // All of it but its parts. False: there is none.
  JFA_HD bool next(Piece& piece, Portion<Units>& portion) {
    const int packed = extents_.packed_rows(sequence_.rows), tiles = tiles_.size();
    for (; row_ < packed && base_ < to_; row_ += extents_.block_rows, base_ += units()) {
      const Range part = shares_.tiles(base_, tiles, from_, to_);
      if (!Shares<Units>::owns(part, base_, tiles, from_, to_)) continue;
      piece.batch = batch_;
      piece.head = head_;
      piece.sequence = sequence_;
      piece.first_row = row_;
      piece.rows = min_of(extents_.block_rows, packed - row_);
      piece.keys = extents_.seen_by_packed(sequence_, row_, row_ + piece.rows);
      piece.tiles = piece.keys.tiles(kColumnTileKeys)
                        .intersect({tiles_.begin + part.begin, tiles_.begin + part.end});
      portion = {base_, tiles, part};
      row_ += extents_.block_rows;
      base_ += units();
      return true;
    }
    return false;
  }

 private:
  JFA_HD int units() const { return tiles_.size() + 1; }

  const CachedExtents& extents_;
  const Shares<Units>& shares_;
  const CachedSequence& sequence_;
  int batch_;
  int head_;
  Range tiles_;
  Units from_;
  Units to_;
  int row_;     // packed, the next item's first
  Units base_;  // where its units begin
};

}  // namespace jax_fa3
