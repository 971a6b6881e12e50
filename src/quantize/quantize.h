// 16-bit query, key and value to e4m3 with scales, or to what they are after that rounding. Memory
// bound: query and key are read once, value twice, since all of a head shares its scale.
#pragma once

#include "base/problem.h"
#include "base/status.h"

struct CUstream_st;

namespace jax_fa3 {

constexpr std::int64_t kQuantizeHeadDimMultiple = 16;  // half a row of four packets (rotation.h)

// What the launches need of the extents; the message names got and expected. No dimension may be 0.
Status check_quantize(const Shape& shape);

// Defined in builds with kernels.
Status launch_quantize_rows(const QuantizeProblem& problem, CUstream_st* stream);  // query and key
Status launch_quantize_value(const QuantizeProblem& problem, CUstream_st* stream);

}  // namespace jax_fa3
