// New tokens into caches, in place, with a rotary embedding of keys and queries on the way. Bound
// by memory and, with few tokens, by latency.
#pragma once

#include "call/cache.h"
#include "call/status.h"

struct CUstream_st;

namespace jax_fa3 {

constexpr int kAppendPacket = 8;              // elements that a thread moves at a time
constexpr std::int64_t kRotaryMultiple = 16;  // columns: a packet of each half

// What the launch needs of the extents; the message names got and expected.
Status check_append(const AppendProblem& problem);

// Defined in builds with kernels.
Status launch_append(const AppendProblem& problem, CUstream_st* stream);

}  // namespace jax_fa3
