// The table of a dense mask (attention/dense_mask.h) from the array that a user has. Made once, for
// as many calls as there are layers.
#pragma once

#include "attention/dense_mask.h"
#include "call/problem.h"
#include "call/status.h"

struct CUstream_st;

namespace jax_fa3 {

// Batch, heads and rows are the mask's own: each may be 1 where attention's are more.
struct DenseMaskProblem {
  Shape shape;                         // batch, num_heads_q, seqlen_q and seqlen_k
  const std::uint8_t* mask = nullptr;  // [b, h, s_q, s_k]; a pair is seen where it is not 0
  std::int32_t* table = nullptr;       // [b, h, words]
  std::int64_t words = 0;              // that a plane of the table has
};

// Of a problem whose extents fit.
inline DenseMaskLayout layout_of(const DenseMaskProblem& problem) {
  return {static_cast<int>(problem.shape.seqlen_q), static_cast<int>(problem.shape.seqlen_k)};
}

// Rows and keys of one thread block.
constexpr int kMaskTileRows = 2 * kMaskBlockRows;
constexpr int kMaskTileKeys = 16 * kMaskBlockKeys;  // of a word of classes

// A plane's tiles. Without rows or without keys it has one as well, which writes what there is.
struct MaskTiles {
  std::int64_t of_rows;
  std::int64_t of_keys;
};
MaskTiles mask_tiles(const Shape& shape);

// What the launch needs of the extents; the message names got and expected.
Status check_dense_mask(const DenseMaskProblem& problem);

// Defined in builds with kernels.
Status launch_dense_mask(const DenseMaskProblem& problem, CUstream_st* stream);

}  // namespace jax_fa3
