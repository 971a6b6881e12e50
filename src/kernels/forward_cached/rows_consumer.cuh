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
      find_rows(piece);

      auto tO = make_accumulator<typename T::MmaO, T::kHeadDimV>();
      Softmax softmax{{p.rescale_threshold, p.rescale_threshold}};
      if (!keys.empty()) load_queries();
      clear(tO);
      if (!keys.empty()) {
        this->skip(loaded.end - keys.end, loaded.end - keys.end);
        attend(tO, softmax, piece, keys);
        this->skip(keys.begin - loaded.begin, keys.begin - loaded.begin);
      } else {
        this->skip(loaded.size(), loaded.size() - 1);
      }
      softmax.gather();
      if (piece.is_whole()) {
        store_whole(tO, softmax);
      } else {
        store_part(tO, softmax, piece);
      }
      this->sync_warpgroup();
      release(queue.ring, works_cursor);
    }
  }

 private:
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

  CUTE_DEVICE void find_rows(const Piece& piece) const {
    if (warpgroup_thread() < kWarpgroupRows) {
      const int row = first_row() + warpgroup_thread();
      PackedRow found;
      if (row < piece.rows) {
        const int sharing = p.extents.heads_per_kv_head;
        const int packed = piece.first_row + row, token = packed / sharing;
        found.place = (piece.sequence.first_token + token) * p.num_heads + piece.head * sharing +
                      packed - token * sharing;
        found.keys = p.extents.row_keys(piece.sequence, token);
      }
      shared.rest.rows[row] = found;
    }
    this->sync_warpgroup();
  }

  // Q, zero where there is none. All loads before the first store, which would wait.
  CUTE_DEVICE void load_queries() const {
    constexpr int kVector = 8;  // elements of 16 bytes
    constexpr int kVectors = T::kHeadDim / kVector;
    constexpr int kLoads = kWarpgroupRows * kVectors / kWarpgroupThreads;
    constexpr int kStep = kWarpgroupRows / kLoads;  // rows
    static_assert(kVectors * kStep == kWarpgroupThreads);
    const int first = warpgroup_thread() / kVectors, col = warpgroup_thread() % kVectors * kVector;
    uint4 vectors[kLoads];
    CUTE_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int place = row(first + i * kStep).place;
      vectors[i] = uint4{0, 0, 0, 0};
      if (place >= 0 && col < p.head_dim) {
        vectors[i] = __ldg(reinterpret_cast<const uint4*>(static_cast<const Element*>(p.query) +
                                                          std::int64_t(place) * p.head_dim + col));
      }
    }
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
  CUTE_DEVICE void store_whole(AccumulatorO& tO, const Softmax& softmax) const {
    float factor[2];
    float* to[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const auto [place, keys] = row(thread_row() + 8 * r);
      const RowPart x{{}, softmax.score(r, p.softmax_scale_log2), softmax.row_sum[r]};
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

  // This part to memory, and the result of all parts by the CTA that finds the others there.
  template <class AccumulatorO>
  CUTE_DEVICE void store_part(const AccumulatorO& tO, const Softmax& softmax,
                              const Piece& piece) const {
    const Partials<T> partials{p, int(blockIdx.x) % p.heads_at_once};
    float* const partial = partials.mine(piece);
    float* to[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int i = first_row() + thread_row() + 8 * r;
      to[r] = i < piece.rows ? partial + i * T::kHeadDimV : nullptr;
      if (threadIdx.x % 4 != 0 || to[r] == nullptr) continue;
      partials.store_statistics(partial, i, softmax.score(r, p.softmax_scale_log2),
                                softmax.row_sum[r]);
    }
    store_floats(tO, to, T::kHeadDimV);
    int& is_last = shared.rest.is_last[warpgroup];
    this->sync_warpgroup();
    if (leads_warpgroup()) is_last = partials.arrive_last(piece, T::kConsumers, warpgroup);
    this->sync_warpgroup();
    if (is_last) fold(partials, piece);
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

  // All parts together, in the order of their keys.
  CUTE_DEVICE void fold(const Partials<T>& partials, const Piece& piece) const {
    constexpr int kQuads = T::kHeadDimV / 4;
    constexpr int kAtOnce = 8;  // loads under way
    const int end = num_rows(piece) * kQuads;
    CUTE_NO_UNROLL
    for (int first = warpgroup_thread(); first < end; first += kAtOnce * kWarpgroupThreads) {
      RowPart all[kAtOnce];
      CUTE_NO_UNROLL
      for (int part = 0; part < piece.parts.count; ++part) {
        const float* const partial = partials.of(piece, part);
        RowPart parts[kAtOnce];
        CUTE_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int v = first + i * kWarpgroupThreads;
          if (v < end) parts[i] = partials.load(partial, first_row() + v / kQuads, v % kQuads);
        }
        CUTE_UNROLL
        for (int i = 0; i < kAtOnce; ++i) all[i].add(parts[i], p.softmax_scale_log2);
      }
      CUTE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int v = first + i * kWarpgroupThreads;
        if (v >= end) continue;
        const auto [place, keys] = row(v / kQuads);
        store_result<Element>(p, place, v % kQuads, all[i], keys.empty());
      }
    }
  }
};

}  // namespace jax_fa3
