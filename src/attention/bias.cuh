// Adding a tile of bias, in shared memory, to a warpgroup's scores. Eight 8 x 8 matrices of 16 bits
// come to a thread's registers just where the accumulator has the scores that they belong to.
//
// Of a bias that all rows share, a tile has the rows of one matrix. A row's bias is in row
// `row & row_mask` of the tile.
#pragma once

#include "device/mma.cuh"

namespace jax_fa3 {

constexpr int kSharedBiasRows = 8;
constexpr int kEveryRow = -1;  // a row mask: each row has its own

// A register's two elements of 16 bits, as float32.
template <class Element>
CUTE_DEVICE float2 unpack(std::uint32_t word) {
  if constexpr (cute::is_same_v<Element, cutlass::bfloat16_t>) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000)};
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  }
}

// tS += factor * bias for 16 columns, from accumulator element `first` on.
template <class Element, class Accumulator>
CUTE_DEVICE void add_words(Accumulator& tS, int first, const std::uint32_t (&words)[4],
                           float factor) {
  CUTE_UNROLL
  for (int w = 0; w < 4; ++w) {
    const float2 two = unpack<Element>(words[w]);
    tS(first + 2 * w) = fmaf(two.x, factor, tS(first + 2 * w));
    tS(first + 2 * w + 1) = fmaf(two.y, factor, tS(first + 2 * w + 1));
  }
}

// A tile of S, whose rows are queries: Tile's rows from `row` on, all of its columns.
template <class Tile, class Accumulator>
CUTE_DEVICE void add_bias(Accumulator& tS, const typename Tile::Element* tile, int row,
                          float factor, int row_mask = kEveryRow) {
  constexpr int kStepCols = 16, kStepBytes = 2 * kStepCols;
  const unsigned thread = threadIdx.x % kWarpgroupThreads;
  const unsigned first_row = (row + thread / 32 * 16 + thread % 16) & row_mask;
  unsigned offset = first_row * Tile::kChunkBytes + thread % 32 / 16 * 16;
  offset ^= offset >> 3 & (Tile::kChunkBytes - 16);  // the swizzle
  const std::uint32_t address = cute::cast_smem_ptr_to_uint(tile) + offset;
  CUTE_UNROLL
  for (int step = 0; step < Tile::kCols / kStepCols; ++step) {
    const int chunk = step * kStepCols / Tile::kChunkCols;
    std::uint32_t words[4];
    load_matrices((address ^ step * kStepBytes % Tile::kChunkBytes) +
                      chunk * Tile::kChunkElements * int(sizeof(typename Tile::Element)),
                  words);
    add_words<typename Tile::Element>(tS, 8 * step, words, factor);
  }
}

// A tile of S^T, whose rows are keys: Tile's columns from `col` on, all of its rows.
template <class Tile, class Accumulator>
CUTE_DEVICE void add_bias_transposed(Accumulator& tSt, const typename Tile::Element* tile, int col,
                                     float factor, int row_mask) {
  constexpr int kStepRows = 16;
  const int step_bytes = (kStepRows & row_mask) * Tile::kChunkBytes;
  const unsigned thread = threadIdx.x % kWarpgroupThreads, lane = thread % 32;
  const unsigned first_row = (lane / 16 * 8 + lane % 8) & row_mask;
  const unsigned first_col = col + thread / 32 * 16 + lane / 8 % 2 * 8;
  unsigned offset = first_row * Tile::kChunkBytes + first_col % Tile::kChunkCols * 2;
  offset ^= offset >> 3 & (Tile::kChunkBytes - 16);  // the swizzle, the same in each 16 rows
  const std::uint32_t address = cute::cast_smem_ptr_to_uint(tile) + offset +
                                first_col / Tile::kChunkCols * Tile::kChunkElements * 2;
  CUTE_UNROLL
  for (int step = 0; step < Tile::kRows / kStepRows; ++step) {
    std::uint32_t words[4];
    load_matrices_transposed(address + step * step_bytes, words);
    add_words<typename Tile::Element>(tSt, 8 * step, words, factor);
  }
}

}  // namespace jax_fa3
