// A thread block takes a token: its keys and values go to the slot that its position has, its query
// to the result. Threads move packets, whichever array they are of.
#include "device/launch.cuh"
#include "device/tile.cuh"
#include "kernels/append/append.h"

namespace jax_fa3 {
namespace {

constexpr int kThreads = 256;

struct Params {
  AppendProblem problem;
  CacheStrides key_strides;
  CacheStrides value_strides;
  int tokens;       // of a sequence
  int key_packets;  // of a head
  int value_packets;
};

// Where a token's keys and values go, in elements, if they are kept.
struct Target {
  bool is_kept = false;
  std::int64_t page = 0;
  std::int64_t slot = 0;

  CUTE_DEVICE std::int64_t offset(const CacheStrides& strides, int head) const {
    return page * strides.page + slot * strides.slot + head * strides.head;
  }
};

// Positions are in 64 bits: a length may be any number.
CUTE_DEVICE Target find(const AppendProblem& p, int b, int i, std::int64_t position) {
  if (p.new_lengths != nullptr && i >= p.new_lengths[b]) return {};
  if (position < 0 || position >= p.cache.capacity()) return {};
  const int at = static_cast<int>(position), page_size = static_cast<int>(p.cache.page_size);
  std::int64_t page = b;
  if (p.block_tables != nullptr) {
    page = p.block_tables[b * p.cache.table_width + at / page_size];
    if (page < 0 || page >= p.cache.pages) return {};
  }
  return {true, page, at % page_size};
}

template <class Element>
using Packet = cutlass::AlignedArray<Element, kAppendPacket>;

template <class Element>
CUTE_DEVICE Packet<Element> load(const Element* head, int packet) {
  return *reinterpret_cast<const Packet<Element>*>(head + packet * kAppendPacket);
}

// A packet of a key or a query as it is turned to a position, of which `cos` and `sin` are the
// table's rows.
template <class Element>
CUTE_DEVICE Packet<Element> turn(const AppendProblem& p, const Element* head, int packet,
                                 const float* cos, const float* sin) {
  Packet<Element> x = load(head, packet);
  const int first = packet * kAppendPacket, half = static_cast<int>(p.half_width);
  if (first >= 2 * half) return x;
  if (p.is_interleaved) {
    CUTE_UNROLL
    for (int j = 0; j < kAppendPacket; j += 2) {
      const float c = cos[(first + j) / 2], s = sin[(first + j) / 2];
      const float even = float(x[j]), odd = float(x[j + 1]);
      x[j] = Element(even * c - odd * s);
      x[j + 1] = Element(odd * c + even * s);
    }
    return x;
  }
  const bool is_left = first < half;
  const int pair = is_left ? first : first - half;
  const Packet<Element> other = load(head, (is_left ? pair + half : pair) / kAppendPacket);
  CUTE_UNROLL
  for (int j = 0; j < kAppendPacket; ++j) {
    const float c = cos[pair + j], s = sin[pair + j];
    x[j] = Element(is_left ? float(x[j]) * c - float(other[j]) * s
                           : float(x[j]) * c + float(other[j]) * s);
  }
  return x;
}

template <class Element>
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ Params params) {
  const AppendProblem& p = params.problem;
  const int b = blockIdx.x / params.tokens, i = blockIdx.x % params.tokens;
  const std::int64_t token = blockIdx.x;
  const std::int64_t position = std::int64_t(p.cache_lengths[b]) + i;
  const Target target = find(p, b, i, position);
  const float *cos = nullptr, *sin = nullptr;
  if (p.cos != nullptr) {
    const std::int64_t row = max(std::int64_t(0), min(position, p.positions - 1));
    cos = p.cos + row * p.half_width;
    sin = p.sin + row * p.half_width;
  }
  const auto moved = [&](const Element* head, int packet) {
    return cos == nullptr ? load(head, packet) : turn(p, head, packet, cos, sin);
  };
  const auto store = [](void* array, std::int64_t offset, int packet, const Packet<Element>& x) {
    auto* const element = static_cast<Element*>(array) + offset + packet * kAppendPacket;
    *reinterpret_cast<Packet<Element>*>(element) = x;
  };

  const int num_heads_kv = static_cast<int>(p.shape.num_heads_kv);
  const int num_heads_q = static_cast<int>(p.shape.num_heads_q);
  const std::int64_t d = p.shape.head_dim, d_v = p.shape.head_dim_v;
  if (target.is_kept) {
    const auto* const key = static_cast<const Element*>(p.key) + token * num_heads_kv * d;
    for (int v = threadIdx.x; v < num_heads_kv * params.key_packets; v += kThreads) {
      const int head = v / params.key_packets, packet = v % params.key_packets;
      store(p.key_cache_out, target.offset(params.key_strides, head), packet,
            moved(key + head * d, packet));
    }
    void* const values =
        p.cache.is_fused ? static_cast<Element*>(p.key_cache_out) + d : p.value_cache_out;
    const auto* const value = static_cast<const Element*>(p.value) + token * num_heads_kv * d_v;
    for (int v = threadIdx.x; v < num_heads_kv * params.value_packets; v += kThreads) {
      const int head = v / params.value_packets, packet = v % params.value_packets;
      store(values, target.offset(params.value_strides, head), packet,
            load(value + head * d_v, packet));
    }
  }
  if (p.query == nullptr) return;
  const auto* const query = static_cast<const Element*>(p.query) + token * num_heads_q * d;
  for (int v = threadIdx.x; v < num_heads_q * params.key_packets; v += kThreads) {
    const int head = v / params.key_packets, packet = v % params.key_packets;
    store(p.query_out, (token * num_heads_q + head) * d, packet, moved(query + head * d, packet));
  }
}

}  // namespace

Status launch_append(const AppendProblem& problem, CUstream_st* stream) {
  const Shape& s = problem.shape;
  const std::int64_t tokens = s.batch * s.seqlen_q;
  if (tokens == 0) return {};
  Params p;
  p.problem = problem;
  p.key_strides = problem.cache.strides(s.num_heads_kv, s.head_dim);
  p.value_strides = problem.cache.strides(s.num_heads_kv, s.head_dim_v);
  p.tokens = static_cast<int>(s.seqlen_q);
  p.key_packets = static_cast<int>(s.head_dim / kAppendPacket);
  p.value_packets = static_cast<int>(s.head_dim_v / kAppendPacket);
  const auto kernel = s.dtype == DType::kBF16 ? append_kernel<ElementOf<DType::kBF16>>
                                              : append_kernel<ElementOf<DType::kFP16>>;
  return launch_kernel("append_kernel", kernel, dim3(static_cast<unsigned>(tokens)), kThreads, 0,
                       stream, p);
}

}  // namespace jax_fa3
