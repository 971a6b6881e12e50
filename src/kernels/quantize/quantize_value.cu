// Value, which has one scale for a head: a pass that measures, a pass that rounds.
#include "attention/prepare_value.cuh"
#include "device/launch.cuh"
#include "kernels/quantize/convert.cuh"
#include "kernels/quantize/quantize.h"
#include "kernels/quantize/rotation.h"

namespace jax_fa3 {
namespace {

// Passes by rows have a thread block for kDescaleBlock keys of a head, a quarter of a row a thread.
constexpr int kThreads = kDescaleBlock * kRowLanes;

struct ValueParams {
  const std::uint16_t* value;   // [b, s_k, h_kv, d_v]
  float* descale;               // [b, h_kv]
  const std::int32_t* lengths;  // [b] or null
  int seqlen_k;
  int num_heads;
  int packets;  // of a row
  int key_blocks;

  __device__ int length(std::int64_t batch) const {
    return lengths == nullptr ? seqlen_k : min(lengths[batch], seqlen_k);
  }
};

// A thread's row.
struct Row {
  std::int64_t head;   // of the array: batch * num_heads + head
  std::int64_t first;  // element
  bool exists;
  bool counts;  // exists, and is no padding
};

__device__ Row row_of(const ValueParams& p, int index) {
  const int head = index % p.num_heads;
  index /= p.num_heads;
  const int key = index % p.key_blocks * kDescaleBlock + threadIdx.x / kRowLanes;
  const std::int64_t batch = index / p.key_blocks;
  const std::int64_t row = (batch * p.seqlen_k + key) * p.num_heads + head;
  return {batch * p.num_heads + head, row * p.packets * kPacket, key < p.seqlen_k,
          key < p.length(batch)};
}

// body(offset) of each packet of the thread.
template <class Body>
__device__ void for_packets(const ValueParams& p, const Row& row, const Body& body) {
#pragma unroll 4
  for (int i = threadIdx.x % kRowLanes; i < p.packets; i += kRowLanes) {
    body(row.first + i * kPacket);
  }
}

// A scale is never negative, so that the largest one has the largest bits.
template <class Pair>
__global__ void __launch_bounds__(kThreads) measure_value_kernel(const ValueParams p) {
  const Row row = row_of(p, blockIdx.x);
  float largest = 0;
  const auto measure = [&](std::int64_t offset) {
    const uint4 packet = *reinterpret_cast<const uint4*>(p.value + offset);
    for (const std::uint32_t word : {packet.x, packet.y, packet.z, packet.w}) {
      const float2 pair = unpack<Pair>(word);
      largest = larger(largest, nan_if_infinite(pair.x));
      largest = larger(largest, nan_if_infinite(pair.y));
    }
  };
  if (row.counts) for_packets(p, row, measure);
  const float descale = descale_of(largest_of_block<kThreads>(largest));
  if (threadIdx.x == 0) {
    atomicMax(reinterpret_cast<int*>(p.descale + row.head), __float_as_int(descale));
  }
}

template <class Pair>
__global__ void __launch_bounds__(kPrepareThreads)
    quantize_value_kernel(const ValueParams p, const PrepareParams prepare) {
  // From the end: what was measured last is still in the cache.
  const PrepareTile tile = prepare_tile(prepare, gridDim.x - 1 - blockIdx.x);
  const float factor = __frcp_rn(p.descale[tile.batch * p.num_heads + tile.head]);
  const auto load = [&](std::int64_t offset) {
    return __ldcs(reinterpret_cast<const uint2*>(p.value + offset));
  };
  const auto round = [&](uint2 four) {
    const float2 low = unpack<Pair>(four.x), high = unpack<Pair>(four.y);
    return round_four(nan_if_infinite(low.x) * factor, nan_if_infinite(low.y) * factor,
                      nan_if_infinite(high.x) * factor, nan_if_infinite(high.y) * factor);
  };
  write_prepared(prepare, tile, p.length(tile.batch), load, round);
}

// The rounded value in its own layout; with kBack in its own dtype again.
template <class Pair, bool kBack>
__global__ void __launch_bounds__(kThreads) round_value_kernel(const ValueParams p, void* out) {
  const Row row = row_of(p, gridDim.x - 1 - blockIdx.x);
  const float descale = p.descale[row.head], factor = __frcp_rn(descale);
  const auto round = [&](std::int64_t offset) {
    uint4 packet{};
    if (row.counts) packet = __ldcs(reinterpret_cast<const uint4*>(p.value + offset));
    const auto round_word = [&](std::uint32_t word) {
      const float2 pair = unpack<Pair>(word);
      return round_pair(nan_if_infinite(pair.x) * factor, nan_if_infinite(pair.y) * factor);
    };
    if constexpr (kBack) {
      const auto back = [&](std::uint32_t word) {
        const float2 rounded = widen_pair(round_word(word));
        return pack<Pair>(rounded.x * descale, rounded.y * descale);
      };
      *reinterpret_cast<uint4*>(static_cast<std::uint16_t*>(out) + offset) = {
          back(packet.x), back(packet.y), back(packet.z), back(packet.w)};
    } else {
      *reinterpret_cast<uint2*>(static_cast<unsigned char*>(out) + offset) = {
          round_word(packet.x) | round_word(packet.y) << 16,
          round_word(packet.z) | round_word(packet.w) << 16};
    }
  };
  if (row.exists) for_packets(p, row, round);
}

ValueParams value_params(const QuantizeProblem& problem) {
  const Shape& s = problem.shape;
  return {static_cast<const std::uint16_t*>(problem.value),
          problem.value_descale,
          problem.index.key_lengths,
          static_cast<int>(s.seqlen_k),
          static_cast<int>(s.num_heads_kv),
          static_cast<int>(s.head_dim_v / kPacket),
          static_cast<int>(ceil_div<std::int64_t>(s.seqlen_k, kDescaleBlock))};
}

unsigned row_blocks(const QuantizeProblem& problem) {
  const Shape& s = problem.shape;
  return static_cast<unsigned>(s.batch * s.num_heads_kv *
                               ceil_div<std::int64_t>(s.seqlen_k, kDescaleBlock));
}

template <class Pair>
Status measure(const QuantizeProblem& problem, cudaStream_t stream) {
  return launch_kernel("measure_value_kernel", measure_value_kernel<Pair>,
                       dim3(row_blocks(problem)), kThreads, 0, stream, value_params(problem));
}

template <class Pair>
Status round(const QuantizeProblem& problem, cudaStream_t stream) {
  const ValueParams p = value_params(problem);
  if (!problem.prepare_value) {
    const auto kernel =
        problem.back ? round_value_kernel<Pair, true> : round_value_kernel<Pair, false>;
    return launch_kernel("round_value_kernel", kernel, dim3(row_blocks(problem)), kThreads, 0,
                         stream, p, problem.value_out);
  }
  const auto grid = static_cast<unsigned>(prepare_blocks(problem.shape));
  return launch_kernel("quantize_value_kernel", quantize_value_kernel<Pair>, dim3(grid),
                       kPrepareThreads, 0, stream, p,
                       prepare_params(problem.shape, problem.value_out));
}

}  // namespace

Status launch_quantize_value(const QuantizeProblem& problem, CUstream_st* stream) {
  const bool is_bf16 = problem.shape.dtype == DType::kBF16;
  JFA_CHECK_OK(is_bf16 ? measure<__nv_bfloat162>(problem, stream)
                       : measure<__half2>(problem, stream));
  return is_bf16 ? round<__nv_bfloat162>(problem, stream) : round<__half2>(problem, stream);
}

}  // namespace jax_fa3
