// From a plan's key to the compiled kernel it names.
#pragma once

#include <vector>

#include "forward/plan.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; host-only builds have no CUDA headers

namespace jax_fa3 {

// Every kernel of cmake/kernel_matrix.cmake, in its order.
const std::vector<ForwardKey>& listed_forward_kernels();

// Those linked into this build.
const std::vector<ForwardKey>& compiled_forward_kernels();

// What plans choose from: the compiled kernels, or all listed ones in a build without any, so that
// such a build can still lower calls for a GPU elsewhere.
const std::vector<ForwardKey>& plannable_forward_kernels();

// Launches plan.key's kernel. Defined in builds with kernels.
Status dispatch_forward(const ForwardPlan& plan, const ForwardProblem& problem,
                        CUstream_st* stream);

}  // namespace jax_fa3
