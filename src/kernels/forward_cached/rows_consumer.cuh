// A consumer warpgroup of many rows: 64 packed query rows against the keys of each piece, as the
// forward kernel's consumers do it (kernels/forward/consumer.cuh). What it has then is the rows'
// result, or a part of it.
#pragma once

#include "kernels/forward/consumer.cuh"
#include "kernels/forward_cached/fold.cuh"
#include "kernels/forward_cached/rows_traits.cuh"

namespace jax_fa3 {

template <class T>
struct CachedRowsConsumer : ForwardConsumer<T> {
  using Base = ForwardConsumer<T>;
  using Base::key_cursor;
  using Base::p;
  using Base::query_cursor;
  using Base::shared;
  using Base::value_cursor;
  using Base::warpgroup;
  using Base::works_cursor;
  using Element = typename T::Element;
  using Softmax = typename T::Softmax;

  // The CTA's pieces, one after another.
  CUTE_DEVICE void run() {
    using namespace cute;
    PieceQueue& queue = shared.rest.pieces;
    if (warpgroup == T::kConsumers - 1) this->pass_turn();  // the first turn is warpgroup 0's
    for (;; works_cursor.advance()) {
      wait_full(queue.ring, works_cursor);
      const Piece& piece = queue.pieces[works_cursor.stage];
      if (piece.none()) return;
      // What the producer loads, and what of it this warpgroup's rows see.
      const Range loaded = broadcast(piece.tiles);
      const TileRange keys = broadcast(own_tiles(piece));

      auto tO = make_accumulator<typename T::MmaO, T::kHeadDimV>();
      clear(tO);
      Softmax softmax{{p.rescale_threshold, p.rescale_threshold}};
      if (!keys.empty()) {
        prepare(piece);
        this->skip(loaded.end - keys.end, loaded.end - keys.end);
        attend(tO, softmax, piece, keys);
        this->skip(keys.begin - loaded.begin, keys.begin - loaded.begin);
      } else {
        this->skip(loaded.size(), loaded.size() - 1);
      }
      softmax.gather();
      write(tO, softmax, piece);
      this->sync_warpgroup();
      release(queue.ring, works_cursor);
    }
  }

 private:
  // The first of this warpgroup's rows in a block, and how many there are.
  CUTE_DEVICE int first_row() const { return warpgroup * kWarpgroupRows; }
  CUTE_DEVICE int num_rows(const Piece& piece) const {
    return min(kWarpgroupRows, piece.rows - first_row());
  }

  CUTE_DEVICE TileRange own_tiles(const Piece& piece) const {
    const int first = piece.first_row + first_row(), rows = num_rows(piece);
    if (rows <= 0) return {};
    const SeenKeys seen = p.extents.seen_by_packed(piece.sequence, first, first + rows);
    return seen.visit(piece.tiles, T::kTileKeys);
  }

  // Q, and which keys each row sees.
  CUTE_DEVICE void prepare(const Piece& piece) const {
    const PackedRows rows{p, piece};
    rows.load_queries<typename T::QTile, kWarpgroupRows>(shared.query[0], first_row());
    if (warpgroup_thread() < kWarpgroupRows) {
      const int row = first_row() + warpgroup_thread();
      shared.rest.row_keys[row] = rows.keys(row);
    }
    cutlass::arch::fence_view_async_shared();
    this->sync_warpgroup();
  }

  // As ForwardConsumer::attend.
  template <class AccumulatorO>
  CUTE_DEVICE void attend(AccumulatorO& tO, Softmax& softmax, const Piece& piece,
                          const TileRange& keys) {
    using namespace cute;
    const auto tSrQ = this->queries();
    auto tP = make_operand_a<Element, T::kTileKeys>();
    const float scale_log2 = p.softmax_scale_log2;

    // The right-most tile: nothing to overlap with yet.
    int n = keys.end - 1;
    {
      auto tS = make_accumulator<typename T::MmaS, T::kTileKeys>();
      this->issue_scores(tSrQ, tS);
      wait_mma<0>(tS);
      release(shared.key_ring, key_cursor);
      key_cursor.advance();
      const bool cut = keys.cuts(n);
      if (cut) mask(tS, n);
      softmax.begin(tS, scale_log2);  // O is zero: no rescale
      convert(tS, tP);
      if (cut) clear_unseen(piece, n);
    }

    const auto step = [&](auto masked) {
      auto tS = make_accumulator<typename T::MmaS, T::kTileKeys>();
      this->take_turn();
      this->issue_scores(tSrQ, tS);
      this->issue_output(tP, tO);
      this->pass_turn();
      wait_mma<1>(tS);
      release(shared.key_ring, key_cursor);
      key_cursor.advance();
      if constexpr (decltype(masked)::value) mask(tS, n);
      const bool rescale = softmax.update(tS, scale_log2);
      this->finish_output(tO);
      convert(tS, tP);
      if (rescale) softmax.rescale(tO);
      if constexpr (decltype(masked)::value) clear_unseen(piece, n);
    };
    --n;
    for (; n >= keys.full_end; --n) step(true_type{});
    for (; n >= keys.full_begin; --n) step(false_type{});
    for (; n >= keys.begin; --n) step(true_type{});

    this->issue_output(tP, tO);
    this->finish_output(tO);
  }

  // -inf where a row does not see a key.
  template <class Accumulator>
  CUTE_DEVICE void mask(Accumulator& tS, int tile) const {
    int low[2], high[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const Range seen = shared.rest.row_keys[first_row() + thread_row() + 8 * r];
      low[r] = seen.begin - tile * T::kTileKeys;
      high[r] = seen.end - 1 - tile * T::kTileKeys;
    }
    mask_columns(tS, low, high);
  }

  // Rows of V that no row of the block sees may hold anything, NaN included, and P = 0 does not
  // stop NaN. Every warpgroup clears them for itself, before its own GEMM reads them.
  CUTE_DEVICE void clear_unseen(const Piece& piece, int tile) const {
    const Range seen = broadcast(piece.keys.any);
    const int begin = seen.begin - tile * T::kTileKeys, end = seen.end - tile * T::kTileKeys;
    if (begin <= 0 && end >= T::kTileKeys) return;
    wait_full(shared.value_ring, value_cursor);
    Element* const value = shared.value[value_cursor.stage];
    const int thread = warpgroup_thread();
    if (begin > 0) T::VTile::zero_rows(value, 0, begin, thread, kWarpgroupThreads);
    if (end < T::kTileKeys) zero_rows_from<typename T::VTile>(value, end);
    cutlass::arch::fence_view_async_shared();
    this->sync_warpgroup();
  }

  // The result to memory, or this part of it, and the result of all parts by the CTA that finds the
  // others there.
  template <class AccumulatorO>
  CUTE_DEVICE void write(const AccumulatorO& tO, const Softmax& softmax, const Piece& piece) const {
    const int end = first_row() + num_rows(piece);  // of this warpgroup's rows
    if (end <= first_row()) return;
    const PackedRows rows{p, piece};
    const Partials<T> partials{p, int(blockIdx.x) % p.heads_at_once};
    float* const partial = piece.is_whole() ? nullptr : partials.mine(piece);
    for_each_quad(tO, softmax, [&](int row, int quad, const RowPart& x) {
      if (row >= end) return;
      if (piece.is_whole()) {
        rows.store<Element>(row, quad, x);
      } else {
        partials.store(partial, row, quad, x);
      }
    });
    if (piece.is_whole()) return;
    int& is_last = shared.rest.is_last[warpgroup];
    this->sync_warpgroup();
    if (leads_warpgroup()) is_last = partials.arrive_last(piece, T::kConsumers, warpgroup);
    this->sync_warpgroup();
    if (!is_last) return;
    constexpr int kQuads = T::kHeadDimV / 4;
    CUTE_NO_UNROLL
    for (int v = warpgroup_thread(); v < num_rows(piece) * kQuads; v += kWarpgroupThreads) {
      const int row = first_row() + v / kQuads;
      rows.store<Element>(row, v % kQuads, partials.fold(piece, row, v % kQuads));
    }
  }

  // Visits four neighbouring elements of a row at a time. Of each eight columns two threads that
  // are neighbours have four, of the same two rows: they swap halves, and each has one of the rows.
  template <class AccumulatorO, class Visit>
  CUTE_DEVICE void for_each_quad(const AccumulatorO& tO, const Softmax& softmax,
                                 const Visit& visit) const {
    const bool is_odd = threadIdx.x % 2 != 0;
    const int row = first_row() + thread_row() + (is_odd ? 8 : 0);
    RowPart x;
    x.reference = is_odd ? softmax.reference[1] : softmax.reference[0];
    x.sum = is_odd ? softmax.row_sum[1] : softmax.row_sum[0];
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tO); i += 4) {
      float kept[2], other[2];
      CUTE_UNROLL
      for (int j = 0; j < 2; ++j) {
        kept[j] = is_odd ? tO(i + 2 + j) : tO(i + j);
        other[j] = __shfl_xor_sync(0xffffffff, is_odd ? tO(i + j) : tO(i + 2 + j), 1);
      }
      x.output = is_odd ? float4{other[0], other[1], kept[0], kept[1]}
                        : float4{kept[0], kept[1], other[0], other[1]};
      visit(row, i / 2 + threadIdx.x % 4 / 2, x);
    }
  }
};

}  // namespace jax_fa3
