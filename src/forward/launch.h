// The door to the forward kernels; launch.cuh defines it, one generated unit per head dim
// instantiates it.
#pragma once

#include <cuda_runtime_api.h>

#include "base/problem.h"
#include "base/status.h"
#include "forward/plan.h"

namespace jax_fa3 {

template <class Config>
Status launch_forward(const ForwardPlan& plan, const ForwardProblem& problem, cudaStream_t stream);

}  // namespace jax_fa3
