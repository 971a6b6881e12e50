// The packed rows of a piece in memory: rows of query and of the results, which stand as far apart
// as tokens and heads do.
#pragma once

#include "device/reduce.cuh"
#include "kernels/forward_cached/params.cuh"

namespace jax_fa3 {

// Four elements of a row of O that has not been divided, with the row's reference (log2 units) and
// sum.
struct RowPart {
  float4 output{0.f, 0.f, 0.f, 0.f};
  float reference = -FLT_MAX;
  float sum = 0.f;

  // Adds what other keys give. What has seen none changes nothing.
  CUTE_DEVICE void add(const RowPart& other) {
    const float moved = fmaxf(reference, other.reference);
    const float mine = exp2_approx(reference - moved);
    const float theirs = exp2_approx(other.reference - moved);
    output.x = output.x * mine + other.output.x * theirs;
    output.y = output.y * mine + other.output.y * theirs;
    output.z = output.z * mine + other.output.z * theirs;
    output.w = output.w * mine + other.output.w * theirs;
    sum = sum * mine + other.sum * theirs;
    reference = moved;
  }
};

struct PackedRows {
  const ForwardCachedParams& p;
  const Piece& piece;

  // The keys that the piece's row `row` sees.
  CUTE_DEVICE Range keys(int row) const {
    Range keys;
    if (row < piece.rows) {
      keys =
          p.extents.row_keys(piece.sequence, (piece.first_row + row) / p.extents.heads_per_kv_head);
    }
    return keys;
  }

  // Rows [first, first + kRows) of Q to a tile, zero where there are none. For all threads of a
  // warpgroup.
  template <class Tile, int kRows>
  CUTE_DEVICE void load_queries(typename Tile::Element* tile, int first) const {
    constexpr int kVector = 8;  // elements of 16 bytes
    constexpr int kVectors = Tile::kCols / kVector;
    const CachedSequence& sequence = piece.sequence;
    const int sharing = p.extents.heads_per_kv_head;
    CUTE_UNROLL
    for (int i = 0; i < kRows * kVectors / kWarpgroupThreads; ++i) {
      const int v = i * kWarpgroupThreads + warpgroup_thread();
      const int row = first + v / kVectors, col = v % kVectors * kVector;
      uint4 vector{0, 0, 0, 0};
      if (row < piece.rows && col < p.head_dim) {
        const int packed = piece.first_row + row, token = packed / sharing;
        const std::int64_t query_row = std::int64_t(sequence.first_token + token) * p.num_heads +
                                       piece.head * sharing + packed % sharing;
        vector = __ldg(reinterpret_cast<const uint4*>(
            static_cast<const typename Tile::Element*>(p.query) + query_row * p.head_dim + col));
      }
      *reinterpret_cast<uint4*>(tile + Tile::offset(row, col)) = vector;
    }
  }

  // Elements 4 quad .. 4 quad + 3 of a row's output, and with the first of them its LSE.
  template <class Element>
  CUTE_DEVICE void store(int row, int quad, const RowPart& x) const {
    const int sharing = p.extents.heads_per_kv_head;
    const int packed = piece.first_row + row, token = packed / sharing;
    const std::int64_t out_row = std::int64_t(piece.sequence.first_token + token) * p.num_heads +
                                 piece.head * sharing + packed % sharing;
    const bool empty = token >= piece.sequence.seen_rows || x.sum == 0.f;
    const float inverse = empty ? 0.f : 1.f / x.sum;
    if (quad == 0) p.lse[out_row] = empty ? -INFINITY : x.reference * kLn2 + logf(x.sum);
    if (4 * quad >= p.head_dim_v) return;
    float4 output{0.f, 0.f, 0.f, 0.f};
    if (!empty) {
      output = {x.output.x * inverse, x.output.y * inverse, x.output.z * inverse,
                x.output.w * inverse};
    }
    const std::int64_t at = out_row * p.head_dim_v + 4 * quad;
    if (p.out_float32) {
      *reinterpret_cast<float4*>(static_cast<float*>(p.out) + at) = output;
    } else {
      cutlass::NumericArrayConverter<Element, float, 4> converter;
      *reinterpret_cast<cutlass::Array<Element, 4>*>(static_cast<Element*>(p.out) + at) =
          converter(reinterpret_cast<const cutlass::Array<float, 4>&>(output));
    }
  }
};

}  // namespace jax_fa3
