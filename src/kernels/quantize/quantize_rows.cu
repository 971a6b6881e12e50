// Query and key: a thread block for each 128 rows of a head, which share a scale. It keeps them in
// registers from load to store, a quarter of a row or of several in each thread, so that an array
// is read once.
#include <array>
#include <utility>

#include "call/shape.h"
#include "device/launch.cuh"
#include "kernels/quantize/convert.cuh"
#include "kernels/quantize/quantize.h"
#include "kernels/quantize/rotation.h"

namespace jax_fa3 {
namespace {

constexpr int kMaxPackets = kMaxHeadDim / kPacket;  // of a row

// How the 128 rows lie in a thread block. A thread has so many that what it does once, about 200
// instructions, is little beside what it does for each element, about 15.
template <int kHeadDim>
struct RowsTile {
  using Row = RotatedRow<kHeadDim>;
  static constexpr int kRows = Row::kRegisters > 24 ? 1 : Row::kRegisters > 8 ? 2 : 4;  // a thread
  static constexpr int kRowStep = kDescaleBlock / kRows;
  static constexpr int kThreads = kRowStep * kRowLanes;
  static constexpr int kElements = kRows * Row::kRegisters;  // a thread
  // Threads to a multiprocessor: 64, 80 or 128 registers each.
  static constexpr int kResident = kElements <= 40 ? 1024 : kElements <= 48 ? 768 : 512;
  static constexpr int kBlocks = kResident / kThreads;
};

struct RowsArray {
  const std::uint16_t* in;      // [b, s, h, d]
  void* out;                    // the same, e4m3 or 16 bits
  float* descale;               // [b, h, blocks]
  const std::int32_t* lengths;  // [b] or null
  int seqlen;
  unsigned num_heads;
  unsigned num_blocks;
};

struct RowsParams {
  RowsArray arrays[2];   // query, key
  float* value_descale;  // [b, h of key], to be 0 for the pass that measures value
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
__global__ void __launch_bounds__(RowsTile<kHeadDim>::kThreads, RowsTile<kHeadDim>::kBlocks)
    quantize_rows_kernel(const __grid_constant__ RowsParams p) {
  using Tile = RowsTile<kHeadDim>;
  using Row = RotatedRow<kHeadDim>;
  const bool is_key = blockIdx.x >= p.query_tiles;
  const RowsArray& array = p.arrays[is_key];
  unsigned tile = blockIdx.x - (is_key ? p.query_tiles : 0);
  const unsigned head = tile % array.num_heads;
  tile /= array.num_heads;
  const unsigned block = tile % array.num_blocks;
  const unsigned batch = tile / array.num_blocks;
  const unsigned of_head = batch * array.num_heads + head;
  const unsigned of_block = of_head * array.num_blocks + block;
  if (is_key && block == 0 && threadIdx.x == 0) p.value_descale[of_head] = 0;

  const int lane = threadIdx.x % kRowLanes;
  const int first_row = block * kDescaleBlock + threadIdx.x / kRowLanes;
  const int length = array.lengths == nullptr ? array.seqlen : array.lengths[batch];
  const auto exists = [&](int r) { return first_row + r * Tile::kRowStep < array.seqlen; };
  const auto counts = [&](int r) { return exists(r) && first_row + r * Tile::kRowStep < length; };
  const std::int64_t first =
      ((std::int64_t(batch) * array.seqlen + first_row) * array.num_heads + head) * kHeadDim +
      kPacket * lane;
  const std::int64_t step = std::int64_t(Tile::kRowStep) * array.num_heads * kHeadDim;

  // Read once, so that the cache is left to what the attention kernel reads.
  uint4 packets[Tile::kRows][Row::kPackets];
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    const auto* const source = reinterpret_cast<const uint4*>(array.in + first + r * step);
#pragma unroll
    for (int i = 0; i < Row::kPackets; ++i) {
      packets[r][i] =
          counts(r) && Row::has_packet(i, lane) ? __ldcs(source + kRowLanes * i) : uint4{};
    }
  }
  const auto signs = [&](int i, int w) { return p.signs[kRowLanes * i + lane] << w & kSignBits; };
  float x[Tile::kRows][Row::kRegisters];
  float largest = 0;
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
#pragma unroll
    for (int i = 0; i < Row::kPackets; ++i) {
      const uint4 packet = packets[r][i];
      const std::uint32_t words[] = {packet.x, packet.y, packet.z, packet.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 pair = unpack<Pair>(words[w] ^ signs(i, w));
        x[r][kPacket * i + 2 * w] = pair.x;
        x[r][kPacket * i + 2 * w + 1] = pair.y;
      }
    }
    hadamard<kHeadDim>(x[r], lane);
#pragma unroll
    for (float& element : x[r]) {
      element = nan_if_infinite(element);
      largest = larger(largest, element);
    }
  }
  constexpr float kNorm = hadamard_norm(Row::kOrder);
  const float descale = descale_of(kNorm * largest_of_block<Tile::kThreads>(largest));
  if (threadIdx.x == 0) array.descale[of_block] = descale;

  // Scaled where it is rounded: ptxas rolls up a long loop that only scales, and then finds its
  // registers by comparing numbers, at forty instructions a product.
  const float factor = __fdiv_rn(kNorm, descale);
  const auto round_two = [&](const float* e) { return round_pair(e[0] * factor, e[1] * factor); };
  const auto four = [&](const float* e) { return round_two(e) | round_two(e + 2) << 16; };
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    if constexpr (!kBack) {
      auto* const out =
          reinterpret_cast<uint2*>(static_cast<unsigned char*>(array.out) + first + r * step);
#pragma unroll
      for (int i = 0; i < Row::kPackets; ++i) {
        if (!exists(r) || !Row::has_packet(i, lane)) continue;
        const float* const e = x[r] + kPacket * i;
        out[kRowLanes * i] = {four(e), four(e + 4)};
      }
    } else {
#pragma unroll
      for (int i = 0; i < Row::kRegisters; i += 2) {
        const float2 pair = widen_pair(round_two(x[r] + i));
        x[r][i] = pair.x;
        x[r][i + 1] = pair.y;
      }
      hadamard<kHeadDim>(x[r], lane);
      const float back = kNorm * descale;
      auto* const out =
          reinterpret_cast<uint4*>(static_cast<std::uint16_t*>(array.out) + first + r * step);
#pragma unroll
      for (int i = 0; i < Row::kPackets; ++i) {
        if (!exists(r) || !Row::has_packet(i, lane)) continue;
        std::uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float* const e = x[r] + kPacket * i + 2 * w;
          words[w] = pack<Pair>(e[0] * back, e[1] * back) ^ signs(i, w);
        }
        out[kRowLanes * i] = {words[0], words[1], words[2], words[3]};
      }
    }
  }
}

struct Launch {
  void (*kernel)(RowsParams);
  int threads;
};

template <class Pair, bool kBack, int... kIndex>
constexpr std::array<Launch, sizeof...(kIndex)> launches(std::integer_sequence<int, kIndex...>) {
  return {Launch{quantize_rows_kernel<Pair, kQuantizeHeadDimMultiple*(kIndex + 1), kBack>,
                 RowsTile<kQuantizeHeadDimMultiple*(kIndex + 1)>::kThreads}...};
}

// That of a head_dim that check_quantize has passed.
template <class Pair>
Launch launch_of(std::int64_t head_dim, bool back) {
  using HeadDims = std::make_integer_sequence<int, kMaxHeadDim / kQuantizeHeadDimMultiple>;
  constexpr auto kThere = launches<Pair, false>(HeadDims{});
  constexpr auto kBack = launches<Pair, true>(HeadDims{});
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
          static_cast<unsigned>(num_heads),
          static_cast<unsigned>(num_blocks)};
}

}  // namespace

Status launch_quantize_rows(const QuantizeProblem& problem, CUstream_st* stream) {
  const Shape& s = problem.shape;
  RowsParams p;
  p.arrays[0] = rows_array(problem.query, problem.query_out, problem.query_descale,
                           problem.index.query_lengths, s.seqlen_q, s.num_heads_q);
  p.arrays[1] = rows_array(problem.key, problem.key_out, problem.key_descale,
                           problem.index.key_lengths, s.seqlen_k, s.num_heads_kv);
  p.value_descale = problem.value_descale;
  const auto tiles = [&](const RowsArray& array) {
    return static_cast<unsigned>(s.batch * array.num_heads * array.num_blocks);
  };
  p.query_tiles = tiles(p.arrays[0]);
  for (int i = 0; i < kMaxPackets; ++i) p.signs[i] = packet_signs(kPacket * i, problem.seed);
  const unsigned grid = p.query_tiles + tiles(p.arrays[1]);
  const Launch launch = s.dtype == DType::kBF16
                            ? launch_of<__nv_bfloat162>(s.head_dim, problem.back)
                            : launch_of<__half2>(s.head_dim, problem.back);
  return launch_kernel("quantize_rows_kernel", launch.kernel, dim3(grid), launch.threads, 0, stream,
                       p);
}

}  // namespace jax_fa3
