// Launching a kernel with more dynamic shared memory than the default, with every CUDA status
// turned into ours.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "call/status.h"

namespace jax_fa3 {

inline Status cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return internal_error(std::string(what) + ": " + cudaGetErrorName(error) + " (" +
                        cudaGetErrorString(error) + ")");
}

// The attribute belongs to the current device, so it is set at every launch: cheap, and legal
// while a graph is captured.
template <class... Params>
Status launch_kernel(const char* name, void (*kernel)(Params...), dim3 grid, int threads,
                     int shared_bytes, cudaStream_t stream, const Params&... params) {
  JFA_CHECK_OK(cuda_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
      name));
  kernel<<<grid, threads, shared_bytes, stream>>>(params...);
  return cuda_status(cudaGetLastError(), name);
}

}  // namespace jax_fa3
