// A float8 forward kernel's static choices.
#pragma once

#include "call/types.h"

namespace jax_fa3 {

struct ForwardFloat8Key {
  int head_dim;  // compiled; a smaller head_dim is zero-filled by TMA
  int head_dim_v;
  int block_m;  // query rows of a work tile, 64 per consumer warpgroup
  int block_n;  // key rows of a tile of the main loop; divides the 128 keys of a descale
};

constexpr bool operator==(const ForwardFloat8Key& a, const ForwardFloat8Key& b) {
  return a.head_dim == b.head_dim && a.head_dim_v == b.head_dim_v && a.block_m == b.block_m &&
         a.block_n == b.block_n;
}

template <int kHeadDim_, int kHeadDimV_, int kBlockM_, int kBlockN_>
struct ForwardFloat8Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr ForwardFloat8Key kKey{kHeadDim, kHeadDimV, kBlockM, kBlockN};
};

}  // namespace jax_fa3
