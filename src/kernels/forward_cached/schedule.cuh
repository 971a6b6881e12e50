// The scheduling warp: from the lengths on the device to this CTA's pieces. A lane works out a
// sequence; the warp walks all of them for the total, and again for its group's share of it, unless
// there are no more than 32, which it still has: no key can be loaded before the first piece is
// known.
#pragma once

#include "kernels/forward_cached/params.cuh"

namespace jax_fa3 {

constexpr unsigned kAllLanes = 0xffffffff;

// An inclusive scan over the first `count` lanes of the warp.
template <class T, class Operation>
CUTE_DEVICE T scan_warp(T value, int count, const Operation& operation) {
  CUTE_NO_UNROLL
  for (int step = 1; step < count; step *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, step);
    if (int(threadIdx.x) % 32 >= step) value = operation(before, value);
  }
  return value;
}

// 32 sequences at a time, in order.
struct SequenceReader {
  const CachedIndex& index;
  const CachedExtents& extents;
  int first_batch = 0;  // of the 32
  int rows_end = 0;     // the ragged rows of all sequences before them end here

  // This lane's.
  CachedSequence sequence;
  int rows;  // of it; 0 behind the last sequence

  CUTE_DEVICE SequenceReader(const CachedIndex& index, const CachedExtents& extents)
      : index(index), extents(extents) {}

  CUTE_DEVICE bool done() const { return first_batch >= extents.batch; }

  CUTE_DEVICE int batch() const { return first_batch + int(threadIdx.x) % 32; }
  // Of the 32, how many there are.
  CUTE_DEVICE int count() const { return max(0, min(32, extents.batch - first_batch)); }

  // Reads the next 32.
  CUTE_DEVICE void read() {
    const int b = batch(), last = extents.batch;
    SequenceEntries entries;
    if (b < last) entries = {index, b};
    int first_token = b * extents.rows_per_sequence;
    rows = extents.rows_per_sequence;
    if (index.query_starts != nullptr) {
      const int start = max(rows_end, read_start(index, extents, min(b, last)));
      const int next = read_start(index, extents, min(b + 1, last));
      first_token = scan_warp(start, count(), [](int x, int y) { return max(x, y); });
      const int end = max(first_token, next);
      rows = end - first_token;
      rows_end = __shfl_sync(kAllLanes, end, max(0, count() - 1));
    }
    if (b >= last) rows = 0;
    sequence = make_sequence(entries, extents, first_token, rows);
  }
  CUTE_DEVICE void advance() { first_batch += 32; }
  CUTE_DEVICE void restart() { first_batch = rows_end = 0; }
};

// The same with their units of the line.
template <class Units>
struct SequenceWalk : SequenceReader {
  Units base = 0;  // units of all sequences before the 32

  // This lane's.
  Units units;   // 0 behind the last sequence
  Units begins;  // where its units do

  using SequenceReader::SequenceReader;

  CUTE_DEVICE void restart() {
    SequenceReader::restart();
    base = 0;
  }
  CUTE_DEVICE void read() {
    SequenceReader::read();
    units = 0;
    if (batch() < extents.batch) {
      const int tiles = extents.seen_by_sequence(sequence).tiles(kColumnTileKeys).size();
      units = Units{extents.blocks(rows)} * (tiles + 1);
    }
    begins = scan_warp(units, count(), [](Units x, Units y) { return x + y; });
    const Units sum = __shfl_sync(kAllLanes, begins, max(0, count() - 1));
    begins += base - units;
    base += sum;
  }
};

// What schedulers have in common.
struct PieceGiver {
  const ForwardCachedParams& p;
  PieceQueue& queue;
  PieceQueue::Cursor cursor{};

  CUTE_DEVICE PieceGiver(const ForwardCachedParams& p, PieceQueue& queue) : p(p), queue(queue) {}

  // One thread. `piece` has no parts yet: its keys can be on their way while those are found.
  template <class Units>
  CUTE_DEVICE void give(const Piece& piece, const Shares<Units>& shares,
                        const Portion<Units>& portion) {
    wait_empty(queue.ring, cursor);
    Piece& given = queue.pieces[cursor.stage];
    given = piece;
    queue.ring.full[cursor.stage].arrive();
    given.parts = shares.parts(portion);
    queue.parts_known[cursor.stage].arrive();
    cursor.advance();
  }
  CUTE_DEVICE void give_end() {
    wait_empty(queue.ring, cursor);
    queue.pieces[cursor.stage] = {/*batch=*/-1};
    queue.ring.full[cursor.stage].arrive();
  }
  // After `lane` has given some.
  CUTE_DEVICE void share_cursor(int lane) {
    cursor.stage = __shfl_sync(kAllLanes, cursor.stage, lane);
    cursor.phase = __shfl_sync(kAllLanes, cursor.phase, lane);
  }

  // Rows in front of the first sequence's and behind the last one's: all CTAs share them.
  CUTE_DEVICE void clear_unowned(int rows_end) const {
    const int first = read_start(p.index, p.extents, 0);
    const int unowned = first + p.extents.tokens - rows_end;
    const std::int64_t width = std::int64_t(p.num_heads) * p.head_dim_v * (p.out_float32 ? 4 : 2);
    CUTE_NO_UNROLL
    for (int i = blockIdx.x; i < unowned; i += gridDim.x) {
      const int row = i < first ? i : rows_end + (i - first);
      auto* const out = reinterpret_cast<uint4*>(static_cast<char*>(p.out) + row * width);
      CUTE_NO_UNROLL
      for (int v = threadIdx.x % 32; v < width / 16; v += 32) out[v] = uint4{0, 0, 0, 0};
      float* const lse = p.lse + std::int64_t(row) * p.num_heads;
      CUTE_NO_UNROLL
      for (int h = threadIdx.x % 32; h < p.num_heads; h += 32) lse[h] = -INFINITY;
    }
  }
};

template <class Units>
struct Scheduler : PieceGiver {
  SequenceWalk<Units> walk;
  Units total;  // units
  int rows_end;

  CUTE_DEVICE Scheduler(const ForwardCachedParams& p, PieceQueue& queue)
      : PieceGiver(p, queue), walk(p.index, p.extents) {}

  // What needs no barrier of the queue.
  CUTE_DEVICE void read() {
    walk.read();
    if (!is_short()) {
      CUTE_NO_UNROLL
      for (walk.advance(); !walk.done(); walk.advance()) walk.read();
    }
    total = walk.base;
    rows_end = walk.rows_end;
  }

  CUTE_DEVICE void run() {
    const Shares<Units> shares(total, p.groups);
    const int group = int(blockIdx.x) / p.heads_at_once;
    if (group < shares.groups) {
      const int first_head = int(blockIdx.x) % p.heads_at_once;
      CUTE_NO_UNROLL
      for (int head = first_head; head < p.num_heads_kv; head += p.heads_at_once) {
        give_share(shares, group, head);
      }
    }
    if (threadIdx.x % 32 == 0) give_end();
    if (p.index.query_starts != nullptr) clear_unowned(rows_end);
  }

 private:
  // Whether all sequences are what one reading gives.
  CUTE_DEVICE bool is_short() const { return p.extents.batch <= 32; }

  CUTE_DEVICE void give_share(const Shares<Units>& shares, int group, int head) {
    const Units from = shares.begin(group), to = shares.begin(group + 1);
    if (!is_short()) {
      walk.restart();
      walk.read();
    }
    CUTE_NO_UNROLL
    for (;;) {
      const bool has_some = walk.begins < to && walk.begins + walk.units > from;
      unsigned left = __ballot_sync(kAllLanes, walk.units > 0 && has_some);
      CUTE_NO_UNROLL
      for (; left != 0; left &= left - 1) {
        const int lane = __ffs(left) - 1;
        if (int(threadIdx.x) % 32 == lane) give_sequence(shares, from, to, head);
        share_cursor(lane);
      }
      if (is_short() || walk.base >= to) return;
      walk.advance();
      if (walk.done()) return;
      walk.read();
    }
  }

  // The lane that has a sequence gives out what of its blocks is in [from, to).
  CUTE_DEVICE void give_sequence(const Shares<Units>& shares, Units from, Units to, int head) {
    PiecesOfSequence<Units> pieces(p.extents, shares, walk.sequence, walk.batch(), head,
                                   walk.begins, from, to);
    Piece piece{};
    Portion<Units> portion;
    CUTE_NO_UNROLL
    while (pieces.next(piece, portion)) give(piece, shares, portion);
  }
};

}  // namespace jax_fa3
