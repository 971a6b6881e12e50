// A forward kernel over caches: its static choices. Everything else is a runtime field.
#pragma once

#include "call/types.h"

namespace jax_fa3 {

struct ForwardCachedKey {
  DType dtype;
  int head_dim;  // compiled; a smaller head_dim is zero-filled by TMA
  int head_dim_v;
  int columns;  // packed query rows that are worked on together
};

constexpr bool operator==(const ForwardCachedKey& a, const ForwardCachedKey& b) {
  return a.dtype == b.dtype && a.head_dim == b.head_dim && a.head_dim_v == b.head_dim_v &&
         a.columns == b.columns;
}

template <DType kDType_, int kHeadDim_, int kHeadDimV_, int kColumns_>
struct ForwardCachedConfig {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kColumns = kColumns_;
  static constexpr ForwardCachedKey kKey{kDType, kHeadDim, kHeadDimV, kColumns};
};

}  // namespace jax_fa3
