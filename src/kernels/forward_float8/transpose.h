// The pre-kernel that brings a plain value into the prepared layout (attention/prepared_value.h).
#pragma once

#include "call/problem.h"
#include "call/status.h"

struct CUstream_st;

namespace jax_fa3 {

// problem.value [b, s_k, h_kv, d_v] into problem.workspace [b, h_kv, d_v, padded keys]; keys past
// s_k become 0. Memory-bound. Defined in builds with kernels.
Status launch_transpose(const ForwardFloat8Problem& problem, CUstream_st* stream);

}  // namespace jax_fa3
