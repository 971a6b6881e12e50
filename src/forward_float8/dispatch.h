// From a plan's key to the compiled kernel it names.
#pragma once

#include <vector>

#include "forward_float8/plan.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; host-only builds have no CUDA headers

namespace jax_fa3 {

// Every kernel of cmake/kernel_matrix.cmake, in its order.
const std::vector<ForwardFloat8Key>& listed_forward_float8_kernels();

// Those linked into this build.
const std::vector<ForwardFloat8Key>& compiled_forward_float8_kernels();

// What plans choose from: the compiled kernels, or all listed ones in a build without any kernel at
// all, so that such a build can still lower calls for a GPU elsewhere.
const std::vector<ForwardFloat8Key>& plannable_forward_float8_kernels();

// Launches plan.key's kernel. Defined in builds with kernels.
Status dispatch_forward_float8(const ForwardFloat8Plan& plan, const ForwardFloat8Problem& problem,
                               CUstream_st* stream);

}  // namespace jax_fa3
