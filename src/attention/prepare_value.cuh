// Brings e4m3 value into the prepared layout, 128 keys by 64 columns of a head at a time: read in
// rows, written in columns. A thread transposes 16 keys by 4 columns in registers; through shared
// memory the columns become whole 128-byte lines.
#pragma once

#include <cuda_runtime.h>

#include "attention/prepare_value.h"

namespace jax_fa3 {

constexpr int kPrepareThreads = 128;

struct PrepareParams {
  unsigned char* prepared;  // [b, h_kv, d_v, key_blocks * 128]
  int seqlen_k;
  int num_heads;
  int head_dim_v;
  int column_blocks;
  int key_blocks;
};

inline PrepareParams prepare_params(const Shape& shape, void* prepared) {
  return {static_cast<unsigned char*>(prepared),
          static_cast<int>(shape.seqlen_k),
          static_cast<int>(shape.num_heads_kv),
          static_cast<int>(shape.head_dim_v),
          static_cast<int>(ceil_div<std::int64_t>(shape.head_dim_v, kPrepareColumns)),
          static_cast<int>(padded_keys(shape.seqlen_k) / kPreparedBlock)};
}

struct PrepareTile {
  int first_column;
  int head;
  int first_key;
  std::int64_t batch;
};

// Tile `index` of prepare_blocks(shape): neighbours are neighbours in memory.
__device__ inline PrepareTile prepare_tile(const PrepareParams& p, int index) {
  PrepareTile tile;
  tile.first_column = index % p.column_blocks * kPrepareColumns;
  index /= p.column_blocks;
  tile.head = index % p.num_heads;
  index /= p.num_heads;
  tile.first_key = index % p.key_blocks * kPreparedBlock;
  tile.batch = index / p.key_blocks;
  return tile;
}

// Column j of the 4 x 4 bytes whose rows are the words of `rows`, in word j.
__device__ inline void transpose_bytes(std::uint32_t (&rows)[4]) {
  const std::uint32_t low01 = __byte_perm(rows[0], rows[1], 0x5140);
  const std::uint32_t low23 = __byte_perm(rows[2], rows[3], 0x5140);
  const std::uint32_t high01 = __byte_perm(rows[0], rows[1], 0x7362);
  const std::uint32_t high23 = __byte_perm(rows[2], rows[3], 0x7362);
  rows[0] = __byte_perm(low01, low23, 0x5410);
  rows[1] = __byte_perm(low01, low23, 0x7632);
  rows[2] = __byte_perm(high01, high23, 0x5410);
  rows[3] = __byte_perm(high01, high23, 0x7632);
}

// Writes a tile; all threads of a block of kPrepareThreads call it. Four columns of a key are
// `round(load(offset))`, a word, where offset is that of the first in [b, s_k, h_kv, d_v]: a
// thread's loads are all under way before the first is rounded. Of the sequence `keys` are read;
// the rest, up to the padded number, become round of nothing.
template <class Load, class Round>
__device__ void write_prepared(const PrepareParams& p, const PrepareTile& tile, int keys,
                               const Load& load, const Round& round) {
  constexpr int kGroups = kPreparedBlock / kPreparedGroup;
  constexpr int kQuads = kPrepareColumns / 4;
  static_assert(kGroups * kQuads == kPrepareThreads);
  // [column][16 bytes of keys], the latter swizzled by the column's quad.
  __shared__ uint4 columns_of_keys[kPrepareColumns][kGroups];

  const int quad = threadIdx.x % kQuads, group = threadIdx.x / kQuads;
  const int column = tile.first_column + 4 * quad;
  const int first_key = tile.first_key + kPreparedGroup * group;
  const std::int64_t stride = std::int64_t(p.num_heads) * p.head_dim_v;
  const std::int64_t first =
      (tile.batch * p.seqlen_k + first_key) * stride + tile.head * p.head_dim_v + column;
  using Loaded = decltype(load(first));
  Loaded loaded[kPreparedGroup];
#pragma unroll
  for (int k = 0; k < kPreparedGroup; ++k) {
    const bool is_read = column < p.head_dim_v && first_key + k < keys;
    loaded[k] = is_read ? load(first + k * stride) : Loaded{};
  }
  std::uint32_t words[kPreparedGroup];  // four columns of a key each
#pragma unroll
  for (int k = 0; k < kPreparedGroup; ++k) words[k] = round(loaded[k]);
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
    columns_of_keys[4 * quad + j][group ^ quad % kGroups] =
        uint4{columns[j][0], columns[j][1], columns[j][2], columns[j][3]};
  }
  __syncthreads();

  const std::int64_t padded = std::int64_t(p.key_blocks) * kPreparedBlock;
#pragma unroll
  for (int i = threadIdx.x; i < kPrepareColumns * kGroups; i += kPrepareThreads) {
    const int local = i / kGroups, chunk = i % kGroups;
    if (tile.first_column + local >= p.head_dim_v) continue;
    const std::int64_t plane = (tile.batch * p.num_heads + tile.head) * p.head_dim_v;
    unsigned char* const target =
        p.prepared + (plane + tile.first_column + local) * padded + tile.first_key;
    reinterpret_cast<uint4*>(target)[chunk] = columns_of_keys[local][chunk ^ local / 4 % kGroups];
  }
}

}  // namespace jax_fa3
