// Memory-bound: each CTA reads 128 keys by 64 columns of one head in rows and writes them in
// columns. A thread transposes 16 keys by 4 columns in registers; through shared memory the columns
// become whole 128-byte lines.
#include "device/launch.cuh"
#include "forward_float8/transpose.h"

namespace jax_fa3 {
namespace {

constexpr int kThreads = 128;
constexpr int kGroups = kPreparedBlock / kPreparedGroup;
constexpr int kQuads = kTransposeColumns / 4;
static_assert(kGroups * kQuads == kThreads);

struct TransposeParams {
  const unsigned char* value;  // [b, s_k, h_kv, d_v]
  unsigned char* prepared;     // [b, h_kv, d_v, key_blocks * 128]
  int seqlen_k;
  int num_heads;
  int head_dim_v;
  int column_blocks;
  int key_blocks;
};

// Column j of the 4 x 4 bytes whose rows are the words of `rows`, in word j.
__device__ void transpose_bytes(std::uint32_t (&rows)[4]) {
  const std::uint32_t low01 = __byte_perm(rows[0], rows[1], 0x5140);
  const std::uint32_t low23 = __byte_perm(rows[2], rows[3], 0x5140);
  const std::uint32_t high01 = __byte_perm(rows[0], rows[1], 0x7362);
  const std::uint32_t high23 = __byte_perm(rows[2], rows[3], 0x7362);
  rows[0] = __byte_perm(low01, low23, 0x5410);
  rows[1] = __byte_perm(low01, low23, 0x7632);
  rows[2] = __byte_perm(high01, high23, 0x5410);
  rows[3] = __byte_perm(high01, high23, 0x7632);
}

__global__ void __launch_bounds__(kThreads) transpose_kernel(const TransposeParams p) {
  // [column][16 bytes of keys], the latter swizzled by the column's quad.
  __shared__ uint4 tile[kTransposeColumns][kGroups];

  int block = blockIdx.x;
  const int first_column = block % p.column_blocks * kTransposeColumns;
  block /= p.column_blocks;
  const int head = block % p.num_heads;
  block /= p.num_heads;
  const int first_key = block % p.key_blocks * kPreparedBlock;
  const std::int64_t batch = block / p.key_blocks;

  const int quad = threadIdx.x % kQuads, group = threadIdx.x / kQuads;
  const int column = first_column + 4 * quad, key = first_key + kPreparedGroup * group;
  const unsigned char* const source =
      p.value + ((batch * p.seqlen_k + key) * p.num_heads + head) * p.head_dim_v + column;
  std::uint32_t words[kPreparedGroup];  // four columns of a key each
#pragma unroll
  for (int k = 0; k < kPreparedGroup; ++k) {
    const bool exists = column < p.head_dim_v && key + k < p.seqlen_k;
    words[k] = exists ? *reinterpret_cast<const std::uint32_t*>(
                            source + std::int64_t(k) * p.num_heads * p.head_dim_v)
                      : 0;
  }
  std::uint32_t columns[4][4];  // [column][word of positions]
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    std::uint32_t rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i] = words[prepared_key(4 * c + i)];
    transpose_bytes(rows);
#pragma unroll
    for (int j = 0; j < 4; ++j) columns[j][c] = rows[j];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    tile[4 * quad + j][group ^ quad % kGroups] =
        uint4{columns[j][0], columns[j][1], columns[j][2], columns[j][3]};
  }
  __syncthreads();

  const std::int64_t padded = std::int64_t(p.key_blocks) * kPreparedBlock;
#pragma unroll
  for (int i = threadIdx.x; i < kTransposeColumns * kGroups; i += kThreads) {
    const int local = i / kGroups, chunk = i % kGroups;
    if (first_column + local >= p.head_dim_v) continue;
    unsigned char* const target =
        p.prepared + ((batch * p.num_heads + head) * p.head_dim_v + first_column + local) * padded +
        first_key;
    reinterpret_cast<uint4*>(target)[chunk] = tile[local][chunk ^ local / 4 % kGroups];
  }
}

}  // namespace

Status launch_transpose(const ForwardFloat8Problem& problem, CUstream_st* stream) {
  const Shape& s = problem.shape;
  TransposeParams p;
  p.value = static_cast<const unsigned char*>(problem.value);
  p.prepared = static_cast<unsigned char*>(problem.workspace);
  p.seqlen_k = static_cast<int>(s.seqlen_k);
  p.num_heads = static_cast<int>(s.num_heads_kv);
  p.head_dim_v = static_cast<int>(s.head_dim_v);
  p.column_blocks = static_cast<int>(ceil_div<std::int64_t>(s.head_dim_v, kTransposeColumns));
  p.key_blocks = static_cast<int>(padded_keys(s.seqlen_k) / kPreparedBlock);
  const auto grid = static_cast<unsigned>(transpose_blocks(s));
  if (grid == 0) return {};
  return launch_kernel("transpose_kernel", transpose_kernel, dim3(grid), kThreads, 0, stream, p);
}

}  // namespace jax_fa3
