// From a problem's extents to everything the launch needs. Pure host code: no CUDA call, tested
// without a GPU.
#pragma once

#include <string>
#include <vector>

#include "call/problem.h"
#include "call/status.h"
#include "kernels/forward/config.h"
#include "kernels/forward/schedule.h"

namespace jax_fa3 {

struct ForwardPlan : TileOrder {
  ForwardKey key;
};

// `available` is the list of kernels to choose from (KernelTable has the compiled ones).
StatusOr<ForwardPlan> plan_forward(const Shape& shape, const MaskOptions& mask,
                                   const IndexPresence& presence,
                                   const std::vector<ForwardKey>& available, int num_sms);

std::string to_string(const ForwardPlan& plan);

}  // namespace jax_fa3
