// The door to the float8 forward kernels; launch.cuh defines it, one generated unit per head dim
// instantiates it.
#pragma once

#include <cuda_runtime_api.h>

#include "base/problem.h"
#include "base/status.h"
#include "forward_float8/plan.h"

namespace jax_fa3 {

template <class Config>
Status launch_forward_float8(const ForwardFloat8Plan& plan, const ForwardFloat8Problem& problem,
                             cudaStream_t stream);

}  // namespace jax_fa3
