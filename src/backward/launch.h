// The door to the backward kernels; launch.cuh defines it, one generated unit per head dim
// instantiates it.
#pragma once

#include <cuda_runtime_api.h>

#include "backward/plan.h"
#include "base/problem.h"
#include "base/status.h"

namespace jax_fa3 {

template <class Config>
Status launch_backward(const BackwardPlan& plan, const BackwardProblem& problem,
                       cudaStream_t stream);

}  // namespace jax_fa3
