// The forward family with kernels that lack a part, for the ablation benchmark: plans, calls and
// tables are the forward family's, only the launch is another.
#pragma once

#include "kernels/forward/family.h"

namespace jax_fa3 {

struct AblatedForward : Forward {
  template <class Config>
  static Status launch(const Plan& plan, const Problem& problem, CUstream_st* stream);
};

}  // namespace jax_fa3
