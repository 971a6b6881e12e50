// A forward kernel over caches: its static choices. Everything else is a runtime field.
#pragma once

#include "call/types.h"

namespace jax_fa3 {

constexpr int kMostColumns = 64;
constexpr int kColumnTileKeys = 64;  // of a tile whose keys are a warpgroup's rows

struct ForwardCachedKey {
  DType dtype;
  int head_dim;  // compiled; a smaller head_dim is zero-filled by TMA
  int head_dim_v;
  // Packed query rows that are worked on together: up to kMostColumns are the columns of products,
  // more are their rows.
  int block_rows;
};

constexpr bool operator==(const ForwardCachedKey& a, const ForwardCachedKey& b) {
  return a.dtype == b.dtype && a.head_dim == b.head_dim && a.head_dim_v == b.head_dim_v &&
         a.block_rows == b.block_rows;
}

constexpr bool has_columns(const ForwardCachedKey& key) { return key.block_rows <= kMostColumns; }

constexpr int tile_keys(const ForwardCachedKey& key) {
  return has_columns(key) || key.head_dim > 128 ? kColumnTileKeys : 128;
}

template <DType kDType_, int kHeadDim_, int kHeadDimV_, int kBlockRows_>
struct ForwardCachedConfig {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kBlockRows = kBlockRows_;
  static constexpr ForwardCachedKey kKey{kDType, kHeadDim, kHeadDimV, kBlockRows};
};

}  // namespace jax_fa3
