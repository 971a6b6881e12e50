// A forward kernel's static choices. Everything else is a runtime field of the problem.
#pragma once

#include "call/types.h"

namespace jax_fa3 {

// What identifies a compiled forward kernel: the row of the dispatch table.
struct ForwardKey {
  DType dtype;
  int head_dim;  // compiled; a smaller head_dim is zero-filled by TMA
  int head_dim_v;
  int block_m;  // query rows of a work tile, 64 per consumer warpgroup
  int block_n;  // key rows of a tile of the main loop
  Variant variant;
};

constexpr bool operator==(const ForwardKey& a, const ForwardKey& b) {
  return a.dtype == b.dtype && a.head_dim == b.head_dim && a.head_dim_v == b.head_dim_v &&
         a.block_m == b.block_m && a.block_n == b.block_n && a.variant == b.variant;
}

template <DType kDType_, int kHeadDim_, int kHeadDimV_, int kBlockM_, int kBlockN_,
          Variant kVariant_>
struct ForwardConfig {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr Variant kVariant = kVariant_;
  static constexpr ForwardKey kKey{kDType, kHeadDim, kHeadDimV, kBlockM, kBlockN, kVariant};
};

}  // namespace jax_fa3
