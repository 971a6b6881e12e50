// From a plan's key to the compiled kernel it names.
#pragma once

#include <vector>

#include "backward/plan.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; host-only builds have no CUDA headers

namespace jax_fa3 {

// Every kernel of cmake/kernel_matrix.cmake, in its order.
const std::vector<BackwardKey>& listed_backward_kernels();

// Those linked into this build.
const std::vector<BackwardKey>& compiled_backward_kernels();

// What plans choose from: the compiled kernels, or all listed ones in a build without any, so that
// such a build can still lower calls for a GPU elsewhere.
const std::vector<BackwardKey>& plannable_backward_kernels();

// Launches plan.key's kernel. Defined in builds with kernels.
Status dispatch_backward(const BackwardPlan& plan, const BackwardProblem& problem,
                         CUstream_st* stream);

}  // namespace jax_fa3
