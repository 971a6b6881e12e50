// A float8 forward kernel's static choices.
#pragma once

#include "call/types.h"

namespace jax_fa3 {

struct ForwardFloat8Key {
  int head_dim;  // compiled; a smaller head_dim is zero-filled by TMA
  int head_dim_v;
  int block_m;  // query rows of a work tile, 64 per consumer warpgroup
  int block_n;  // key rows of a tile of the main loop; divides the 128 keys of a descale
  // The tensor cores keep about 14 bits of an 8-bit product's accumulator. 0: they sum a whole row
  // of O; n: sums of n key tiles, added up in float32 by the vector units.
  int promote;
};

constexpr bool operator==(const ForwardFloat8Key& a, const ForwardFloat8Key& b) {
  return a.head_dim == b.head_dim && a.head_dim_v == b.head_dim_v && a.block_m == b.block_m &&
         a.block_n == b.block_n && a.promote == b.promote;
}

template <int kHeadDim_, int kHeadDimV_, int kBlockM_, int kBlockN_, int kPromote_>
struct ForwardFloat8Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kPromote = kPromote_;
  static constexpr ForwardFloat8Key kKey{kHeadDim, kHeadDimV, kBlockM, kBlockN, kPromote};
};

}  // namespace jax_fa3
