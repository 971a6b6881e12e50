// A consumer warpgroup: every second key tile of each piece, with a softmax and an O of its own.
// Where a piece ends consumer 1 hands its O over through shared memory; consumer 0 adds it, and
// writes the result, or a part of it.
#pragma once

#include "kernels/forward_cached/fold.cuh"

namespace jax_fa3 {

template <class T>
struct CachedConsumer {
  using NamedBarrier = cutlass::arch::NamedBarrier;
  using Element = typename T::Element;
  using Softmax = typename T::Softmax;

  const ForwardCachedParams& p;
  typename T::SharedStorage& shared;
  const int warpgroup;  // 0 or 1

  typename T::Cursor cursor{};
  int turn = 0;  // which warpgroup takes the next tile

  CUTE_DEVICE void run() {
    PieceQueue& queue = shared.rest.pieces;
    PieceQueue::Cursor piece_cursor;
    if (warpgroup == 0) NamedBarrier::arrive(2 * kWarpgroupThreads, T::kTaken);
    for (;; piece_cursor.advance()) {
      wait_full(queue.ring, piece_cursor);
      const Piece& piece = queue.pieces[piece_cursor.stage];
      if (piece.none()) break;
      auto tO = make_accumulator<typename T::MmaO, T::kColumns, T::kHeadDimV>();
      cute::clear(tO);
      Softmax softmax(p.rescale_threshold);
      prepare(piece);
      bool is_first = true;
      CUTE_NO_UNROLL
      for (int tile = piece.tiles.begin; tile < piece.tiles.end; ++tile) {
        if (turn == warpgroup) {
          attend(tO, softmax, piece, tile, is_first);
          is_first = false;
        }
        turn ^= 1;
        cursor.advance();
      }
      softmax.gather(shared.rest.exchange[warpgroup], T::kOwn + warpgroup);
      queue.wait_parts(piece_cursor);
      if (warpgroup == 1) {
        hand_over(tO, softmax);
      } else {
        take_over(tO, softmax);
        write(piece);
      }
      sync_own();
      release(queue.ring, piece_cursor);
    }
  }

 private:
  CUTE_DEVICE void sync_own() const { NamedBarrier::sync(kWarpgroupThreads, T::kOwn + warpgroup); }

  // Q, zero where there is none, and which keys each column sees.
  CUTE_DEVICE void prepare(const Piece& piece) const {
    constexpr int kVector = 8;  // elements of 16 bytes
    constexpr int kVectors = T::kHeadDim / kVector;
    const CachedSequence& sequence = piece.sequence;
    const Divisor& sharing = p.extents.heads_per_kv_head;
    Element* const query = shared.own[warpgroup].query;
    CUTE_UNROLL
    for (int i = 0; i < T::kColumns * kVectors / kWarpgroupThreads; ++i) {
      const int v = i * kWarpgroupThreads + warpgroup_thread();
      const int column = v / kVectors, first = v % kVectors * kVector;
      uint4 vector{0, 0, 0, 0};
      if (column < piece.rows && first < p.head_dim) {
        const int packed = piece.first_row + column, row = packed / sharing;
        const std::int64_t query_row = std::int64_t(sequence.first_token + row) * p.num_heads +
                                       piece.head * sharing + packed % sharing;
        vector = __ldg(reinterpret_cast<const uint4*>(static_cast<const Element*>(p.query) +
                                                      query_row * p.head_dim + first));
      }
      *reinterpret_cast<uint4*>(query + T::QTile::offset(column, first)) = vector;
    }
    if (warpgroup_thread() < T::kColumns) {
      const int column = warpgroup_thread();
      Range keys;
      if (column < piece.rows) {
        keys = p.extents.row_keys(sequence, (piece.first_row + column) / sharing);
      }
      shared.rest.column_keys[warpgroup][column] = keys;
    }
    cutlass::arch::fence_view_async_shared();
    sync_own();
  }

  template <class AccumulatorO>
  CUTE_DEVICE void attend(AccumulatorO& tO, Softmax& softmax, const Piece& piece, int tile,
                          bool is_first) const {
    typename T::MmaS mma_s;
    typename T::MmaO mma_o;
    typename T::Own& own = shared.own[warpgroup];
    const float scale_log2 = p.softmax_scale_log2;
    const bool cut = piece.keys.cuts(tile, T::kTileKeys);

    auto tS = make_accumulator<typename T::MmaS, T::kColumns>();
    wait_full(shared.key_ring, cursor);
    issue_mma<Accumulate::kOverwrite>(mma_s,
                                      operand_a(mma_s, T::KTile::tensor(shared.key[cursor.stage])),
                                      operand_b(mma_s, T::QTile::tensor(own.query)), tS);
    wait_mma<0>(tS);
    release(shared.key_ring, cursor);
    if (cut) mask(tS, tile);

    // The barrier that P needs asks too whether P may stay.
    auto tP = make_accumulator<typename T::MmaS, T::kColumns>();
    bool outgrown = is_first;
    if (!is_first) {
      outgrown = softmax.exponentiate(tS, tP, scale_log2);
      sync_own();  // every warp's product with the P before has been waited for
      store_accumulator<typename T::PTile>(tP, own.probabilities, 0);
      cutlass::arch::fence_view_async_shared();
      outgrown = any_of_warpgroup(outgrown, T::kOwn + warpgroup);
    }
    if (outgrown) {
      softmax.follow(tS, scale_log2, shared.rest.exchange[warpgroup], T::kOwn + warpgroup);
      Softmax::scale_columns(tO, softmax.correction);
      softmax.exponentiate(tS, tP, scale_log2);
      store_accumulator<typename T::PTile>(tP, own.probabilities, 0);
      cutlass::arch::fence_view_async_shared();
      sync_own();
    }
    softmax.add(tP);

    wait_full(shared.value_ring, cursor);
    Element* const value = shared.value[cursor.stage];
    if (cut) clear_unseen(value, piece.keys.any, tile);
    issue_mma<Accumulate::kAdd>(mma_o, operand_a(mma_o, T::VTile::transposed(value)),
                                operand_b(mma_o, T::PTile::transposed(own.probabilities)), tO);
    wait_mma<0>(tO);
    release(shared.value_ring, cursor);
  }

  // -inf where a column does not see a key.
  template <class Accumulator>
  CUTE_DEVICE void mask(Accumulator& tS, int tile) const {
    const Range* const columns = shared.rest.column_keys[warpgroup];
    const int key = tile * T::kTileKeys + thread_row();
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      const Range seen = columns[thread_col() + accumulator_col(i)];
      const int row = key + 8 * accumulator_row(i);
      if (row < seen.begin || row >= seen.end) tS(i) = -INFINITY;
    }
  }

  // Rows of V that no row sees may hold anything, NaN included, and P = 0 does not stop NaN.
  CUTE_DEVICE void clear_unseen(Element* value, const Range& seen, int tile) const {
    const int begin = seen.begin - tile * T::kTileKeys, end = seen.end - tile * T::kTileKeys;
    if (begin <= 0 && end >= T::kTileKeys) return;
    const int thread = warpgroup_thread();
    if (begin > 0) T::VTile::zero_rows(value, 0, begin, thread, kWarpgroupThreads);
    if (end < T::kTileKeys) {
      T::VTile::zero_rows(value, end, T::kTileKeys, thread, kWarpgroupThreads);
    }
    cutlass::arch::fence_view_async_shared();
    sync_own();
  }

  // Where element i of O is staged.
  CUTE_DEVICE static int staged(int i) {
    constexpr int kOfBlock = T::kColumns / 2;  // elements of 64 rows
    const int row = thread_row() + 8 * accumulator_row(i) + i / kOfBlock * kWarpgroupRows;
    const int column = thread_col() + accumulator_col(i % kOfBlock);
    return column * T::kStagedStride + row;
  }
  // Whether this thread is the one that keeps the statistics of its columns.
  CUTE_DEVICE static bool keeps_columns() { return warpgroup_thread() < 4; }

  template <class AccumulatorO>
  CUTE_DEVICE void hand_over(const AccumulatorO& tO, const Softmax& softmax) const {
    NamedBarrier::sync(2 * kWarpgroupThreads, T::kTaken);
    stage(tO, softmax);
    NamedBarrier::arrive(2 * kWarpgroupThreads, T::kStaged);
  }

  // Consumer 0's keys come first in the sum, as do those of a part with lower ones.
  template <class AccumulatorO>
  CUTE_DEVICE void take_over(AccumulatorO& tO, Softmax& softmax) const {
    auto& rest = shared.rest;
    NamedBarrier::sync(2 * kWarpgroupThreads, T::kStaged);
    float mine[Softmax::kOwn], theirs[Softmax::kOwn];
    CUTE_UNROLL
    for (int j = 0; j < Softmax::kOwn; ++j) {
      const int column = Softmax::column(j);
      const float reference = rest.reference[column];
      const float moved = fmaxf(softmax.reference[j], reference);
      mine[j] = exp2_approx((softmax.reference[j] - moved) * p.softmax_scale_log2);
      theirs[j] = exp2_approx((reference - moved) * p.softmax_scale_log2);
      softmax.reference[j] = moved;
      softmax.sum[j] = softmax.sum[j] * mine[j] + rest.sum[column] * theirs[j];
    }
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tO); ++i) {
      const int j = Softmax::own(i);
      tO(i) = tO(i) * mine[j] + rest.output[staged(i)] * theirs[j];
    }
    sync_own();  // all have read the statistics
    stage(tO, softmax);
    sync_own();
  }

  template <class AccumulatorO>
  CUTE_DEVICE void stage(const AccumulatorO& tO, const Softmax& softmax) const {
    auto& rest = shared.rest;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tO); ++i) rest.output[staged(i)] = tO(i);
    if (!keeps_columns()) return;
    CUTE_UNROLL
    for (int j = 0; j < Softmax::kOwn; ++j) {
      rest.reference[Softmax::column(j)] = softmax.reference[j];
      rest.sum[Softmax::column(j)] = softmax.sum[j];
    }
  }

  // From what is staged to memory: the result, or this part of it, and the result of all parts by
  // the CTA that finds the others there.
  CUTE_DEVICE void write(const Piece& piece) const {
    auto& rest = shared.rest;
    const Partials<T> partials{p, piece.head};
    float* const partial = piece.is_whole() ? nullptr : partials.mine(piece);
    for_each_quad(piece, [&](int column, int quad) {
      const auto* const output = rest.output + column * T::kStagedStride + 4 * quad;
      const RowPart x{*reinterpret_cast<const float4*>(output), rest.reference[column],
                      rest.sum[column]};
      if (piece.is_whole()) {
        store(piece, column, quad, x);
      } else {
        partials.store(partial, column, quad, x);
      }
    });
    sync_own();
    NamedBarrier::arrive(2 * kWarpgroupThreads, T::kTaken);
    if (piece.is_whole()) return;
    if (leads_warpgroup()) rest.is_last = partials.arrive_last(piece, 1, 0);
    sync_own();
    if (!rest.is_last) return;
    for_each_quad(piece, [&](int column, int quad) {
      store(piece, column, quad, partials.fold(piece, column, quad));
    });
  }

  template <class Visit>
  CUTE_DEVICE void for_each_quad(const Piece& piece, const Visit& visit) const {
    constexpr int kQuads = T::kHeadDimV / 4;
    CUTE_NO_UNROLL
    for (int v = warpgroup_thread(); v < piece.rows * kQuads; v += kWarpgroupThreads) {
      visit(v / kQuads, v % kQuads);
    }
  }

  CUTE_DEVICE void store(const Piece& piece, int column, int quad, const RowPart& x) const {
    const Divisor& sharing = p.extents.heads_per_kv_head;
    const int packed = piece.first_row + column, row = packed / sharing;
    const std::int64_t out_row = std::int64_t(piece.sequence.first_token + row) * p.num_heads +
                                 piece.head * sharing + packed % sharing;
    store_result<Element>(p, out_row, quad, x, row >= piece.sequence.seen_rows);
  }
};

}  // namespace jax_fa3
