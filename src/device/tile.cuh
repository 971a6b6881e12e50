// A 2-D tile in shared memory, as TMA writes it and WGMMA reads it.
//
// Columns are cut into chunks of one swizzled row, the widest of 128, 64 and 32 bytes that divides
// the width; a chunk holds all rows. The same bytes serve WGMMA as a K-major operand (contracted
// along the columns) and, if of 16 bits, as an MN-major one (contracted along the rows).
//
// CuTe's grammar of tensor names: the letters after the first say what is partitioned how
// (tSrS: accumulator of S, by the MMA that makes S, in registers); s in shared memory, r in
// registers, g in global memory.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <cute/tensor.hpp>

#include "call/types.h"

namespace jax_fa3 {

template <DType kDType>
using ElementOf = cute::conditional_t<kDType == DType::kBF16, cutlass::bfloat16_t, cutlass::half_t>;

template <class Element>
constexpr int chunk_cols(int cols) {
  constexpr int kSize = sizeof(Element);
  return (cols * kSize % 128 == 0 ? 128 : cols * kSize % 64 == 0 ? 64 : 32) / kSize;
}

template <class Element_, int kRows_, int kCols_, int kChunkCols_ = chunk_cols<Element_>(kCols_)>
struct SmemTile {
  using Element = Element_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kChunkCols = kChunkCols_;
  static constexpr int kChunkBytes = kChunkCols * int(sizeof(Element));
  static constexpr int kChunks = kCols / kChunkCols;
  static constexpr int kChunkElements = kRows * kChunkCols;
  static constexpr int kElements = kRows * kCols;
  static constexpr int kBytes = kElements * sizeof(Element);
  static_assert(sizeof(Element) <= 2 && kRows % 8 == 0 && kCols % kChunkCols == 0);
  static_assert(kChunkBytes == 128 || kChunkBytes == 64 || kChunkBytes == 32);

  // The swizzle by the chunk's bytes: 128, 64 or 32.
  template <class Atom128, class Atom64, class Atom32>
  using BySwizzle = cute::conditional_t<kChunkBytes == 128, Atom128,
                                        cute::conditional_t<kChunkBytes == 64, Atom64, Atom32>>;
  using AtomK =
      BySwizzle<cute::GMMA::Layout_K_SW128_Atom<Element>, cute::GMMA::Layout_K_SW64_Atom<Element>,
                cute::GMMA::Layout_K_SW32_Atom<Element>>;
  using AtomMn =
      BySwizzle<cute::GMMA::Layout_MN_SW128_Atom<Element>, cute::GMMA::Layout_MN_SW64_Atom<Element>,
                cute::GMMA::Layout_MN_SW32_Atom<Element>>;
  // (row, col)
  using Layout =
      decltype(cute::tile_to_shape(AtomK{}, cute::Shape<cute::Int<kRows>, cute::Int<kCols>>{}));
  // (col, row), the same bytes
  using LayoutT =
      decltype(cute::tile_to_shape(AtomMn{}, cute::Shape<cute::Int<kCols>, cute::Int<kRows>>{},
                                   cute::Step<cute::_2, cute::_1>{}));

  CUTE_DEVICE static auto tensor(Element* data) {
    return cute::make_tensor(cute::make_smem_ptr(data), Layout{});
  }
  CUTE_DEVICE static auto transposed(Element* data) {
    return cute::make_tensor(cute::make_smem_ptr(data), LayoutT{});
  }

  // Where an element stands.
  CUTE_DEVICE static int offset(int row, int col) {
    const int byte = (row * kChunkCols + col % kChunkCols) * int(sizeof(Element));
    const int swizzled = byte ^ (byte >> 3 & (kChunkBytes - 16));
    return col / kChunkCols * kChunkElements + swizzled / int(sizeof(Element));
  }

  // Rows [kHeight i, kHeight i + kHeight), by default one warpgroup's.
  template <int kHeight = 64>
  CUTE_DEVICE static auto row_block(Element* data, int i) {
    return cute::local_tile(tensor(data), cute::Shape<cute::Int<kHeight>, cute::Int<kCols>>{},
                            cute::make_coord(i, 0));
  }
  // kWidth columns of the transposed view, from column `first`, a multiple of kChunkCols.
  template <int kWidth>
  CUTE_DEVICE static auto transposed_cols(Element* data, int first) {
    return cute::local_tile(transposed(data + first / kChunkCols * kChunkElements),
                            cute::Shape<cute::Int<kWidth>, cute::Int<kRows>>{},
                            cute::make_coord(0, 0));
  }

  // Zeroes rows [first_row, end_row), with `threads` threads of which this is number `thread`.
  CUTE_DEVICE static void zero_rows(Element* data, int first_row, int end_row, int thread,
                                    int threads) {
    constexpr int kVectorsPerRow = kChunkBytes / 16;
    const int vectors = (end_row - first_row) * kVectorsPerRow;
    CUTE_NO_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      auto* base = reinterpret_cast<uint4*>(data + chunk * kChunkElements + first_row * kChunkCols);
      CUTE_NO_UNROLL
      for (int i = thread; i < vectors; i += threads) base[i] = uint4{0, 0, 0, 0};
    }
  }
};

}  // namespace jax_fa3
