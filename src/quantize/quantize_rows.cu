// Query and key: a thread block for each 128 rows of a head, which share a scale. It keeps them in
// registers from load to store, a quarter of a row in each thread, so that an array is read once.
#include <array>
#include <utility>

#include "base/shape.h"
#include "device/launch.cuh"
#include "quantize/convert.cuh"
#include "quantize/quantize.h"
#include "quantize/rotation.h"

namespace jax_fa3 {
namespace {

constexpr int kThreads = kDescaleBlock * kRowLanes;
constexpr int kMaxPackets = kMaxHeadDim / kPacket;  // of a row

struct RowsArray {
  const std::uint16_t* in;      // [b, s, h, d]
  void* out;                    // the same, e4m3 or 16 bits
  float* descale;               // [b, h, blocks]
  const std::int32_t* lengths;  // [b] or null
  int seqlen;
  int num_heads;
  int num_blocks;
};

struct RowsParams {
  RowsArray arrays[2];  // query, key
  unsigned query_tiles;
  std::uint32_t signs[kMaxPackets];  // of each packet of a row
};

template <int kHeadDim, std::size_t kRegisters>
__device__ void hadamard(float (&x)[kRegisters], int lane) {
  using Row = RotatedRow<kHeadDim>;
  Row::mix_registers(x);
#pragma unroll
  for (int bit = 1; bit < kRowLanes; bit *= 2) {
    if (!Row::has_lane_bit(bit)) continue;
    const float sign = lane & bit ? -1.f : 1.f;
#pragma unroll
    for (float& element : x) {
      element = mix_lanes(element, __shfl_xor_sync(~0u, element, bit), sign);
    }
  }
}

// With kBack the results are rounded, and then in their own dtype and basis again.
template <class Pair, int kHeadDim, bool kBack>
__global__ void __launch_bounds__(kThreads, kHeadDim <= 128 ? 2 : 1)
    quantize_rows_kernel(const __grid_constant__ RowsParams p) {
  using Row = RotatedRow<kHeadDim>;
  const bool is_key = blockIdx.x >= p.query_tiles;
  const RowsArray& array = p.arrays[is_key];
  int tile = blockIdx.x - (is_key ? p.query_tiles : 0);
  const int head = tile % array.num_heads;
  tile /= array.num_heads;
  const int block = tile % array.num_blocks;
  const std::int64_t batch = tile / array.num_blocks;

  const int lane = threadIdx.x % kRowLanes;
  const int row = block * kDescaleBlock + threadIdx.x / kRowLanes;
  const bool exists = row < array.seqlen;
  const bool counts = exists && (array.lengths == nullptr || row < array.lengths[batch]);
  const std::int64_t first =
      ((batch * array.seqlen + row) * array.num_heads + head) * kHeadDim + kPacket * lane;

  // Read once, so that the cache is left to what the attention kernel reads.
  uint4 packets[Row::kPackets];
#pragma unroll
  for (int i = 0; i < Row::kPackets; ++i) {
    const auto* const source = reinterpret_cast<const uint4*>(array.in + first + kPacketStride * i);
    packets[i] = counts && Row::has_packet(i, lane) ? __ldcs(source) : uint4{};
  }
  float x[Row::kRegisters];
  const auto signs = [&](int i, int w) { return p.signs[kRowLanes * i + lane] << w & kSignBits; };
#pragma unroll
  for (int i = 0; i < Row::kPackets; ++i) {
    const std::uint32_t words[] = {packets[i].x, packets[i].y, packets[i].z, packets[i].w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 pair = unpack<Pair>(words[w] ^ signs(i, w));
      x[kPacket * i + 2 * w] = pair.x;
      x[kPacket * i + 2 * w + 1] = pair.y;
    }
  }
  hadamard<kHeadDim>(x, lane);

  float largest = 0;
#pragma unroll
  for (float& element : x) {
    element = nan_if_infinite(element);
    largest = larger(largest, element);
  }
  constexpr float kNorm = hadamard_norm(Row::kOrder);
  const float descale = descale_of(kNorm * largest_of_block<kThreads>(largest));
  if (threadIdx.x == 0) {
    array.descale[(batch * array.num_heads + head) * array.num_blocks + block] = descale;
  }

  const float factor = __fdiv_rn(kNorm, descale);
#pragma unroll
  for (float& element : x) element *= factor;
  if constexpr (!kBack) {
    unsigned char* const out = static_cast<unsigned char*>(array.out) + first;
#pragma unroll
    for (int i = 0; i < Row::kPackets; ++i) {
      if (!exists || !Row::has_packet(i, lane)) continue;
      const float* const e = x + kPacket * i;
      *reinterpret_cast<uint2*>(out + kPacketStride * i) = {round_four(e[0], e[1], e[2], e[3]),
                                                            round_four(e[4], e[5], e[6], e[7])};
    }
  } else {
#pragma unroll
    for (int i = 0; i < Row::kRegisters; i += 2) {
      const float2 pair = widen_pair(round_pair(x[i], x[i + 1]));
      x[i] = pair.x;
      x[i + 1] = pair.y;
    }
    hadamard<kHeadDim>(x, lane);
    const float back = kNorm * descale;
    std::uint16_t* const out = static_cast<std::uint16_t*>(array.out) + first;
#pragma unroll
    for (int i = 0; i < Row::kPackets; ++i) {
      if (!exists || !Row::has_packet(i, lane)) continue;
      std::uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float* const e = x + kPacket * i + 2 * w;
        words[w] = pack<Pair>(e[0] * back, e[1] * back) ^ signs(i, w);
      }
      *reinterpret_cast<uint4*>(out + kPacketStride * i) = {words[0], words[1], words[2], words[3]};
    }
  }
}

using Kernel = void (*)(RowsParams);

template <class Pair, bool kBack, int... kIndex>
constexpr std::array<Kernel, sizeof...(kIndex)> kernels(std::integer_sequence<int, kIndex...>) {
  return {quantize_rows_kernel<Pair, kQuantizeHeadDimMultiple*(kIndex + 1), kBack>...};
}

// The kernel of a head_dim that check_quantize has passed.
template <class Pair>
Kernel kernel_of(std::int64_t head_dim, bool back) {
  using HeadDims = std::make_integer_sequence<int, kMaxHeadDim / kQuantizeHeadDimMultiple>;
  constexpr auto kThere = kernels<Pair, false>(HeadDims{});
  constexpr auto kBack = kernels<Pair, true>(HeadDims{});
  return (back ? kBack : kThere)[head_dim / kQuantizeHeadDimMultiple - 1];
}

RowsArray rows_array(const void* in, void* out, float* descale, const std::int32_t* lengths,
                     std::int64_t seqlen, std::int64_t num_heads) {
  const auto num_blocks = ceil_div<std::int64_t>(seqlen, kDescaleBlock);
  return {static_cast<const std::uint16_t*>(in),
          out,
          descale,
          lengths,
          static_cast<int>(seqlen),
          static_cast<int>(num_heads),
          static_cast<int>(num_blocks)};
}

}  // namespace

Status launch_quantize_rows(const QuantizeProblem& problem, CUstream_st* stream) {
  const Shape& s = problem.shape;
  RowsParams p;
  p.arrays[0] = rows_array(problem.query, problem.query_out, problem.query_descale,
                           problem.index.query_lengths, s.seqlen_q, s.num_heads_q);
  p.arrays[1] = rows_array(problem.key, problem.key_out, problem.key_descale,
                           problem.index.key_lengths, s.seqlen_k, s.num_heads_kv);
  const auto tiles = [&](const RowsArray& array) {
    return static_cast<unsigned>(s.batch * array.num_heads * array.num_blocks);
  };
  p.query_tiles = tiles(p.arrays[0]);
  for (int i = 0; i < kMaxPackets; ++i) p.signs[i] = packet_signs(kPacket * i, problem.seed);
  const unsigned grid = p.query_tiles + tiles(p.arrays[1]);
  const Kernel kernel = s.dtype == DType::kBF16
                            ? kernel_of<__nv_bfloat162>(s.head_dim, problem.back)
                            : kernel_of<__half2>(s.head_dim, problem.back);
  return launch_kernel("quantize_rows_kernel", kernel, dim3(grid), kThreads, 0, stream, p);
}

}  // namespace jax_fa3
