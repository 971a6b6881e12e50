#include "attention/prepare_value.cuh"
#include "device/launch.cuh"
#include "kernels/forward_float8/transpose.h"

namespace jax_fa3 {
namespace {

__global__ void __launch_bounds__(kPrepareThreads)
    transpose_kernel(const PrepareParams p, const unsigned char* value) {
  const auto load = [&](std::int64_t offset) {
    return *reinterpret_cast<const std::uint32_t*>(value + offset);
  };
  const auto as_it_is = [](std::uint32_t word) { return word; };
  write_prepared(p, prepare_tile(p, blockIdx.x), p.seqlen_k, load, as_it_is);
}

}  // namespace

Status launch_transpose(const ForwardFloat8Problem& problem, CUstream_st* stream) {
  const auto grid = static_cast<unsigned>(prepare_blocks(problem.shape));
  if (grid == 0) return {};
  return launch_kernel("transpose_kernel", transpose_kernel, dim3(grid), kPrepareThreads, 0, stream,
                       prepare_params(problem.shape, problem.workspace),
                       static_cast<const unsigned char*>(problem.value));
}

}  // namespace jax_fa3
