// Launching a kernel with more dynamic shared memory than the default, with every CUDA status
// turned into ours.
#pragma once

#include <cuda_runtime.h>

#include <cute/config.hpp>
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
Status allow_shared_bytes(const char* name, void (*kernel)(Params...), int shared_bytes) {
  return cuda_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
      name);
}

template <class... Params>
Status launch_kernel(const char* name, void (*kernel)(Params...), dim3 grid, int threads,
                     int shared_bytes, cudaStream_t stream, const Params&... params) {
  JFA_CHECK_OK(allow_shared_bytes(name, kernel, shared_bytes));
  kernel<<<grid, threads, shared_bytes, stream>>>(params...);
  return cuda_status(cudaGetLastError(), name);
}

// Of a kernel that the runtime has loaded, by its handle, whose only parameter is `params`.
template <class Params>
Status launch_loaded(const char* name, const void* kernel, dim3 grid, int threads, int shared_bytes,
                     cudaStream_t stream, const Params& params) {
  JFA_CHECK_OK(cuda_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
      name));
  void* arguments[] = {const_cast<Params*>(&params)};
  return cuda_status(cudaLaunchKernel(kernel, grid, dim3(threads), arguments, shared_bytes, stream),
                     name);
}

// A kernel that has been launched early begins when all blocks of the one before have called
// begin_next_grid(), and has that one's results behind await_grid_before(). CUTLASS' functions for
// this are empty unless a macro is defined.
CUTE_DEVICE void begin_next_grid() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
CUTE_DEVICE void await_grid_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

template <class... Params>
Status launch_early(const char* name, void (*kernel)(Params...), dim3 grid, int threads,
                    int shared_bytes, cudaStream_t stream, const Params&... params) {
  JFA_CHECK_OK(allow_shared_bytes(name, kernel, shared_bytes));
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cuda_status(cudaLaunchKernelEx(&config, kernel, params...), name);
}

}  // namespace jax_fa3
