// The forward kernel on e4m3 operands. docs/design/forward_float8.md has what differs.
#pragma once

#include "forward/kernel.cuh"
#include "forward_float8/consumer.cuh"

namespace jax_fa3 {

template <class Config>
__global__ void __launch_bounds__(ForwardFloat8Traits<Config>::kThreads, 1)
    forward_float8_kernel(const __grid_constant__ ForwardFloat8Params p) {
  using T = ForwardFloat8Traits<Config>;
  run_forward<T, ForwardFloat8Consumer<T>>(p);
}

}  // namespace jax_fa3
