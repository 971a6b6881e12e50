// A backward kernel's static choices. Everything else is a runtime field of the problem.
#pragma once

#include "call/types.h"

namespace jax_fa3 {

// Whether shares of dQ may be rounded to a grid (dquery_grid.cuh). The slope of a user's function
// has no bound, and what a dense mask hides is not told from what it does not.
constexpr bool takes_grid(Variant variant) {
  return variant == Variant::kPlain || variant == Variant::kSoftcap || variant == Variant::kAlibi;
}

// What identifies a compiled backward kernel: the row of the dispatch table.
struct BackwardKey {
  DType dtype;
  int head_dim;  // compiled; a smaller head_dim is zero-filled by TMA
  int head_dim_v;
  int block_m;       // query rows of a step of the main loop
  int block_n;       // key rows of a work tile
  bool separate_dq;  // dQ by a kernel of its own: deterministic, no float32 workspace
  Variant variant;
};

constexpr bool operator==(const BackwardKey& a, const BackwardKey& b) {
  return a.dtype == b.dtype && a.head_dim == b.head_dim && a.head_dim_v == b.head_dim_v &&
         a.block_m == b.block_m && a.block_n == b.block_n && a.separate_dq == b.separate_dq &&
         a.variant == b.variant;
}

template <DType kDType_, int kHeadDim_, int kHeadDimV_, int kBlockM_, int kBlockN_,
          bool kSeparateDQ_, Variant kVariant_>
struct BackwardConfig {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr bool kSeparateDQ = kSeparateDQ_;
  static constexpr Variant kVariant = kVariant_;
  static constexpr BackwardKey kKey{kDType,  kHeadDim,    kHeadDimV, kBlockM,
                                    kBlockN, kSeparateDQ, kVariant};
};

}  // namespace jax_fa3
