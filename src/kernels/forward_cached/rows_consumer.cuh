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
    uint4 queries[kLoads];  // of the piece at `works_cursor`, between one piece's keys and its own
    wait_full(queue.ring, works_cursor);
    if constexpr (kFetchesAhead) fetch_queries(queries, queue.pieces[works_cursor.stage]);
    for (;;) {
      const Piece& piece = queue.pieces[works_cursor.stage];
      if (piece.none()) return;
      // What the producer loads, and what of it this warpgroup's rows see.
      const Range loaded = broadcast(piece.tiles);
      const TileRange keys = broadcast(own_tiles(piece));
      find_rows(piece);

      auto tO = make_accumulator<typename T::MmaO, T::kHeadDimV>();
      Softmax softmax{{p.rescale_threshold, p.rescale_threshold}};
      if constexpr (!kFetchesAhead) fetch_queries(queries, piece);
      put_queries(queries);
      clear(tO);
      if (!keys.empty()) {
        this->skip(loaded.end - keys.end, loaded.end - keys.end);
        attend(tO, softmax, piece, keys);
        this->skip(keys.begin - loaded.begin, keys.begin - loaded.begin);
      } else {
        this->skip(loaded.size(), loaded.size() - 1);
      }
      auto next_cursor = works_cursor;
      next_cursor.advance();
      wait_full(queue.ring, next_cursor);
      if constexpr (kFetchesAhead) fetch_queries(queries, queue.pieces[next_cursor.stage]);

      softmax.gather();
      Statistics statistics;
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        statistics.reference[r] = softmax.score(r, p.softmax_scale_log2);
        statistics.sum[r] = softmax.row_sum[r];
      }
      queue.wait_parts(works_cursor);
      if (piece.is_whole() || join_parts(tO, statistics, piece)) store(tO, statistics);
      this->sync_warpgroup();
      release(queue.ring, works_cursor);
      works_cursor = next_cursor;
    }
  }

 private:
  // Of a warpgroup's Q, in 16 bytes at a time: those of a thread, and the rows between two of them.
  static constexpr int kVector = 8;  // elements
  static constexpr int kVectors = T::kHeadDim / kVector;
  static constexpr int kLoads = kWarpgroupRows * kVectors / kWarpgroupThreads;
  static constexpr int kStep = kWarpgroupRows / kLoads;
  static_assert(kVectors * kStep == kWarpgroupThreads);
  // Whether the next piece's are on their way while this one's results leave. Where head_dim is
  // large there are no registers for that.
  static constexpr bool kFetchesAhead = T::kHeadDim <= 128;

  // Of a thread's rows.
  struct Statistics {
    float reference[2];  // scores
    float sum[2];
  };

  // The first of this warpgroup's rows in a block, and how many there are.
  CUTE_DEVICE int first_row() const { return warpgroup * kWarpgroupRows; }
  CUTE_DEVICE int num_rows(const Piece& piece) const {
    return max(0, min(kWarpgroupRows, piece.rows - first_row()));
  }
  CUTE_DEVICE const PackedRow& row(int i) const { return shared.rest.rows[first_row() + i]; }

  CUTE_DEVICE TileRange own_tiles(const Piece& piece) const {
    const int first = piece.first_row + first_row(), rows = num_rows(piece);
    if (rows == 0) return {};
    const SeenKeys seen = p.extents.seen_by_packed(piece.sequence, first, first + rows);
    return seen.visit(piece.tiles, T::kTileKeys);
  }

  // Where row `row` of a block stands in arrays of [tokens, h_q].
  CUTE_DEVICE int place(const Piece& piece, int row) const {
    const Divisor& sharing = p.extents.heads_per_kv_head;
    const int packed = piece.first_row + row, token = packed / sharing;
    return (piece.sequence.first_token + token) * p.num_heads + piece.head * sharing + packed -
           token * sharing;
  }

  CUTE_DEVICE void find_rows(const Piece& piece) const {
    if (warpgroup_thread() < kWarpgroupRows) {
      const int row = first_row() + warpgroup_thread();
      PackedRow found;
      if (row < piece.rows) {
        found.place = place(piece, row);
        const int token = (piece.first_row + row) / p.extents.heads_per_kv_head;
        found.keys = p.extents.row_keys(piece.sequence, token);
      }
      shared.rest.rows[row] = found;
    }
    this->sync_warpgroup();
  }

  // Q, zero where there is none. All loads before the first store, which would wait; and where they
  // stand, for there is other work behind them.
  CUTE_DEVICE void fetch_queries(uint4 (&vectors)[kLoads], const Piece& piece) const {
    const int first = warpgroup_thread() / kVectors, col = warpgroup_thread() % kVectors * kVector;
    const int rows = col < p.head_dim ? num_rows(piece) : 0;
    CUTE_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int row = first + i * kStep;
      vectors[i] = uint4{0, 0, 0, 0};
      if (row >= rows) continue;
      const auto* const query = static_cast<const Element*>(p.query) +
                                std::int64_t(place(piece, first_row() + row)) * p.head_dim + col;
      asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(vectors[i].x), "=r"(vectors[i].y), "=r"(vectors[i].z), "=r"(vectors[i].w)
                   : "l"(query));
    }
  }
  CUTE_DEVICE void put_queries(const uint4 (&vectors)[kLoads]) const {
    const int first = warpgroup_thread() / kVectors, col = warpgroup_thread() % kVectors * kVector;
    CUTE_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int offset = T::QTile::offset(first_row() + first + i * kStep, col);
      *reinterpret_cast<uint4*>(shared.query[0] + offset) = vectors[i];
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
      const Range seen = row(thread_row() + 8 * r).keys;
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

  // The result to memory, 16 bits by way of Q's rows in shared memory.
  template <class AccumulatorO>
  CUTE_DEVICE void store(AccumulatorO& tO, const Statistics& statistics) const {
    float factor[2];
    float* to[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const auto [place, keys] = row(thread_row() + 8 * r);
      const RowPart x{{}, statistics.reference[r], statistics.sum[r]};
      const bool empty = keys.empty() || x.sum == 0.f;
      factor[r] = empty ? 0.f : 1.f / x.sum;
      if (threadIdx.x % 4 == 0 && place >= 0) {
        p.lse[place] = empty ? -INFINITY : x.lse(p.softmax_scale_log2);
      }
      auto* const out = static_cast<float*>(p.out) + std::int64_t(place) * p.head_dim_v;
      to[r] = place >= 0 ? out : nullptr;
    }
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tO); ++i) {
      const float scale = factor[accumulator_row(i)];
      tO(i) = scale == 0.f ? 0.f : tO(i) * scale;
    }
    if (p.out_float32) return store_floats(tO, to, p.head_dim_v);

    using OTile = typename T::OTile;
    constexpr int kVectors = T::kHeadDimV / 8;  // of 16 bytes
    store_accumulator<OTile>(tO, shared.query[0], first_row());
    this->sync_warpgroup();
    CUTE_UNROLL
    for (int v = warpgroup_thread(); v < kWarpgroupRows * kVectors; v += kWarpgroupThreads) {
      const int i = v / kVectors, col = v % kVectors * 8;
      const int place = row(i).place;
      if (place < 0 || col >= p.head_dim_v) continue;
      auto* const out = static_cast<Element*>(p.out) + std::int64_t(place) * p.head_dim_v + col;
      *reinterpret_cast<uint4*>(out) =
          *reinterpret_cast<const uint4*>(shared.query[0] + OTile::offset(first_row() + i, col));
    }
  }

  template <class AccumulatorO>
  CUTE_DEVICE static void store_floats(const AccumulatorO& tO, float* const (&to)[2], int columns) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tO); i += 2) {
      float* const row = to[accumulator_row(i)];
      const int col = thread_col() + accumulator_col(i);
      if (row == nullptr || col >= columns) continue;
      *reinterpret_cast<float2*>(row + col) = float2{tO(i), tO(i + 1)};
    }
  }

  // This part to memory; all of them in its place, in the order of their keys, where the others are
  // there already. False: they are not. In memory O is as the threads have it, four elements of
  // each after another: every access is 16 bytes beside the next thread's.
  template <class AccumulatorO>
  CUTE_DEVICE bool join_parts(AccumulatorO& tO, Statistics& statistics, const Piece& piece) const {
    constexpr int kQuads = decltype(cute::size(tO))::value / 4;
    const Partials<T> partials{p, int(blockIdx.x) % p.heads_at_once};
    const int first_float = first_row() * T::kHeadDimV + 4 * warpgroup_thread();
    const auto quad_of = [&](float* partial, int quad) {
      return reinterpret_cast<float4*>(partial + first_float) + quad * kWarpgroupThreads;
    };
    float* const mine = partials.mine(piece);
    CUTE_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      *quad_of(mine, q) = {tO(4 * q), tO(4 * q + 1), tO(4 * q + 2), tO(4 * q + 3)};
    }
    if (threadIdx.x % 4 == 0) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int row = first_row() + thread_row() + 8 * r;
        partials.store_statistics(mine, row, statistics.reference[r], statistics.sum[r]);
      }
    }
    int& is_last = shared.rest.is_last[warpgroup];
    this->sync_warpgroup();
    if (leads_warpgroup()) is_last = partials.arrive_last(piece, T::kConsumers, warpgroup);
    this->sync_warpgroup();
    if (!is_last) return false;

    // Each element is replaced by that which comes kAtOnce later, in this part or the next, as soon
    // as it has been added: so many loads are always under way.
    constexpr int kAtOnce = kQuads > 16 ? 8 : kQuads;
    float4 quads[kAtOnce];
    float2 theirs[2];
    float* partial = partials.of(piece, 0);
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      theirs[r] = partials.load_statistics(partial, first_row() + thread_row() + 8 * r);
      statistics.reference[r] = -FLT_MAX;
      statistics.sum[r] = 0.f;
    }
    CUTE_UNROLL
    for (int q = 0; q < kAtOnce; ++q) quads[q] = __ldcg(quad_of(partial, q));
    cute::clear(tO);
    CUTE_NO_UNROLL
    for (int part = 0; part < piece.parts.count; ++part) {
      const bool has_next = part + 1 < piece.parts.count;
      float* const next = has_next ? partials.of(piece, part + 1) : nullptr;
      float old_weight[2], new_weight[2];
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float reference = statistics.reference[r], moved = fmaxf(reference, theirs[r].x);
        old_weight[r] = exp2_approx((reference - moved) * p.softmax_scale_log2);
        new_weight[r] = exp2_approx((theirs[r].x - moved) * p.softmax_scale_log2);
        statistics.reference[r] = moved;
        statistics.sum[r] = statistics.sum[r] * old_weight[r] + theirs[r].y * new_weight[r];
        if (has_next) {
          theirs[r] = partials.load_statistics(next, first_row() + thread_row() + 8 * r);
        }
      }
      CUTE_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        float4& quad = quads[q % kAtOnce];
        const float elements[4] = {quad.x, quad.y, quad.z, quad.w};
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int r = accumulator_row(i);
          tO(4 * q + i) = tO(4 * q + i) * old_weight[r] + elements[i] * new_weight[r];
        }
        const int ahead = q + kAtOnce;
        if (ahead < kQuads) {
          quad = __ldcg(quad_of(partial, ahead));
        } else if (has_next) {
          quad = __ldcg(quad_of(next, ahead - kQuads));
        }
      }
      partial = next;
    }
    return true;
  }
};

}  // namespace jax_fa3
