// The table of a mask in one pass over it: a thread block makes all of the table that is of 128 rows
// and 256 keys.
//
// First threads pack bytes to bits, in shared memory. What takes the time is memory, so each asks
// for all its bytes before it looks at any. It loads from multiples of 16 bytes, wherever rows
// begin, and whoever reads a row's bits shifts them.
//
// Then a warp has 32 keys of all rows. It transposes their bits, so that each of its lanes has a
// key's; a key's line gets 16 bytes of a thread block, by lanes side by side.
#include "device/launch.cuh"
#include "kernels/dense_mask/dense_mask.h"

namespace jax_fa3 {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kMaskTileRows;
constexpr int kKeys = kMaskTileKeys;
constexpr int kGroups = kRows / kMaskBlockRows;
constexpr int kRowWords = kRows / 32;  // of a key
constexpr int kKeyWords = kKeys / 32;  // of a row
static_assert(32 * kKeyWords == kThreads, "a warp for each 32 keys");
static_assert(kKeys == 16 * kMaskBlockKeys, "a thread block writes one word of classes a group");

constexpr int kPacket = 16;  // bytes of a load
constexpr int kPackets = kKeys / kPacket;
constexpr int kRowsAtOnce = kThreads / kPackets;
constexpr int kRowsOfThread = kRows / kRowsAtOnce;
static_assert(kRowsAtOnce % kPacket == 0, "a thread's rows begin at the same place of a packet");

constexpr std::uint32_t kAll = ~0u;
constexpr std::uint32_t kClassesOfNothing = 0xaaaaaaaa;  // blocks that are not there

struct Params {
  const std::uint8_t* mask;
  std::uint64_t bytes;
  std::uint32_t* table;
  DenseMaskLayout layout;
  unsigned tiles_of_rows;
  unsigned tiles_of_keys;
};

// A thread block's part of a plane.
struct Tile {
  std::uint32_t* plane;
  std::uint64_t first;  // byte of the mask
  int row, key;         // the first ones
  int rows, keys;       // how many are there
  bool last_keys;       // of all tiles of these rows
  bool last;            // of all tiles of the plane
};

// Side by side in memory are tiles of the same rows.
__device__ Tile tile_of(const Params& p, unsigned index) {
  const unsigned of_keys = index % p.tiles_of_keys;
  index /= p.tiles_of_keys;
  const unsigned of_rows = index % p.tiles_of_rows;
  const std::int64_t plane = index / p.tiles_of_rows;
  Tile tile;
  tile.row = of_rows * kRows;
  tile.key = of_keys * kKeys;
  tile.rows = min(p.layout.rows - tile.row, kRows);
  tile.keys = min(p.layout.seqlen_k - tile.key, kKeys);
  tile.plane = p.table + plane * p.layout.words();
  tile.first = (plane * p.layout.rows + tile.row) * p.layout.seqlen_k + tile.key;
  tile.last_keys = of_keys == p.tiles_of_keys - 1;
  tile.last = tile.last_keys && of_rows == p.tiles_of_rows - 1;
  return tile;
}

__device__ std::uint32_t lowest_bits(int count) {
  return count >= 32 ? kAll : count <= 0 ? 0 : (1u << count) - 1;
}

// ---- bytes to bits

// A bit for each byte that is not 0, the first byte's the lowest.
__device__ std::uint32_t pack(const uint4& packet) {
  const auto high_bits = [](std::uint32_t x) {
    return (((x & 0x7f7f7f7f) + 0x7f7f7f7f) | x) & 0x80808080;
  };
  // Products with powers of two: a byte's bit goes where it belongs, times 128.
  const auto of_eight = [&](std::uint32_t low, std::uint32_t high) {
    return __dp4a(high_bits(high), 0x80402010u, __dp4a(high_bits(low), 0x08040201u, 0u));
  };
  return of_eight(packet.x, packet.y) >> 7 | of_eight(packet.z, packet.w) << 1;
}

// Of the bytes behind the mask's last whole packet.
__device__ std::uint32_t pack_rest(const Params& p) {
  const std::uint64_t whole = p.bytes / kPacket * kPacket;
  const int count = p.bytes % kPacket;
  std::uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) bits |= (p.mask[whole + i] != 0 ? 1u : 0u) << i;
  return bits;
}

// A tile's rows from the packet on that each begins in, so that a row that begins within a packet
// has one more. Rows and packets that are not there have no bits.
struct Lines {
  std::uint32_t words[kRows][kKeyWords + 1];

  __device__ void store(int row, int packet, std::uint32_t bits) {
    reinterpret_cast<std::uint16_t*>(words[row])[packet] = static_cast<std::uint16_t>(bits);
  }
  // A row's keys from 32 * word on; behind those of the row are any. What is not there of the last
  // word is shifted out.
  __device__ std::uint32_t bits(const Params& p, const Tile& tile, int row, int word) const {
    const unsigned seqlen_k = p.layout.seqlen_k;  // of the place in a packet low bits are enough
    const unsigned begin = static_cast<unsigned>(tile.first) + row * seqlen_k;
    return __funnelshift_r(words[row][word], words[row][word + 1], begin % kPacket);
  }
};

__device__ void pack_tile(const Params& p, const Tile& tile, Lines& lines) {
  const auto* const packets = reinterpret_cast<const uint4*>(p.mask);
  const std::uint64_t whole = p.bytes / kPacket;
  const auto first_packet = [&](int row, int packet, bool& is_there) {
    const std::uint64_t begin = tile.first + std::int64_t{row} * p.layout.seqlen_k;
    const std::uint64_t index = begin / kPacket + packet;
    is_there = row < tile.rows && index * kPacket < begin + tile.keys;
    return index;
  };
  const auto load = [&](std::uint64_t index, bool is_there) {
    return is_there && index < whole ? __ldcs(packets + index) : uint4{};
  };
  const auto store = [&](int row, int packet, std::uint64_t index, bool is_there,
                         const uint4& bytes) {
    std::uint32_t bits = pack(bytes);
    if (is_there && index >= whole) bits = pack_rest(p);
    lines.store(row, packet, bits);
  };

  const int packet = threadIdx.x % kPackets, row = threadIdx.x / kPackets;
  bool is_there, more_is_there = false;
  const std::uint64_t index = first_packet(row, packet, is_there);
  const auto step = p.layout.seqlen_k * std::uint64_t{kRowsAtOnce / kPacket};  // packets
  const auto has_row = [&](int i) { return is_there && row + kRowsAtOnce * i < tile.rows; };
  uint4 bytes[kRowsOfThread];
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) bytes[i] = load(index + i * step, has_row(i));
  // The one more that rows may have.
  std::uint64_t more = 0;
  if (threadIdx.x < kRows) more = first_packet(threadIdx.x, kPackets, more_is_there);
  const uint4 more_bytes = load(more, more_is_there);
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {
    store(row + kRowsAtOnce * i, packet, index + i * step, has_row(i), bytes[i]);
  }
  if (threadIdx.x < kRows) store(threadIdx.x, kPackets, more, more_is_there, more_bytes);
}

// ---- the parts of a table

__device__ void write_bits(const Params& p, const Tile& tile, const Lines& lines) {
  const int word = threadIdx.x % kKeyWords;
  const int of_line = tile.key / 32 + word;
  if (of_line >= p.layout.key_words()) return;
  const std::uint32_t there = lowest_bits(tile.keys - 32 * word);
  std::uint32_t* const bits =
      tile.plane + p.layout.bits() + std::int64_t{tile.row} * p.layout.key_words() + of_line;
  constexpr int kStep = kThreads / kKeyWords;
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const int row = threadIdx.x / kKeyWords + kStep * i;
    if (row >= tile.rows) break;
    bits[std::int64_t{row} * p.layout.key_words()] = lines.bits(p, tile, row, word) & there;
  }
}

// Of a warp: bit i of lane k becomes bit k of lane i. Each step exchanges two quarters of every
// square of 2 * kStep bits.
__device__ std::uint32_t transpose(std::uint32_t x, int lane) {
  constexpr std::uint32_t kLower[] = {0x55555555, 0x33333333, 0x0f0f0f0f, 0x00ff00ff, 0x0000ffff};
#pragma unroll
  for (int i = 4; i >= 0; --i) {
    const int step = 1 << i;
    const bool upper = lane & step;
    const std::uint32_t other = __shfl_xor_sync(kAll, x, step);
    const std::uint32_t kept = upper ? ~kLower[i] : kLower[i];
    x = (x & kept) | (__funnelshift_l(other, other, upper ? 32 - step : step) & ~kept);
  }
  return x;
}

// Of four lanes side by side: word i of lane k becomes word k of lane i.
__device__ void transpose_words(std::uint32_t (&x)[4], int lane) {
#pragma unroll
  for (int step = 2; step >= 1; step /= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const std::uint32_t other = __shfl_xor_sync(kAll, upper ? x[i] : x[i + step], step);
      (upper ? x[i] : x[i + step]) = other;
    }
  }
}

// The columns, and what the warp's keys add to the classes of a group.
__device__ void write_columns(const Params& p, const Tile& tile, const Lines& lines,
                              std::uint32_t (&classes)[kGroups]) {
  const int lane = threadIdx.x % 32, word = threadIdx.x / 32;
  const std::uint32_t there = lowest_bits(tile.keys - 32 * word);
  std::uint32_t any[kGroups] = {}, all[kGroups], columns[kRowWords];
#pragma unroll
  for (std::uint32_t& bits : all) bits = kAll;
#pragma unroll
  for (int i = 0; i < kRowWords; ++i) {
    const int row = 32 * i + lane, group = 32 * i / kMaskBlockRows;
    const std::uint32_t bits = lines.bits(p, tile, row, word) & there;
    any[group] |= __reduce_or_sync(kAll, bits);
    all[group] &= __reduce_and_sync(kAll, row < tile.rows ? bits | ~there : kAll);
    columns[i] = transpose(bits, lane);
  }
  if (lane == 0) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const std::uint32_t low = (any[group] & 0xffff) != 0 | ((all[group] & 0xffff) == 0xffff) << 1;
      const std::uint32_t high = (any[group] >> 16) != 0 | (all[group] >> 16 == 0xffff) << 1;
      atomicOr(&classes[group], (low | high << 2) << 4 * word);
    }
  }

  // One row is all rows.
  if (p.layout.rows == 1) columns[0] = (columns[0] & 1) != 0 ? kAll : 0;
  static_assert(kRowWords == 4);
  transpose_words(columns, lane);
  const int of_line = tile.row / 32 + lane % 4;
  const int key = 32 * word + lane / 4 * 4;
  std::uint32_t* const out = tile.plane + p.layout.columns() +
                             std::int64_t{tile.key + key} * p.layout.row_words() + of_line;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (key + i >= tile.keys || of_line >= p.layout.row_words()) break;
    out[std::int64_t{i} * p.layout.row_words()] = columns[i];
  }
}

// A line of classes has a word more than there are tiles.
__device__ void write_classes(const Params& p, const Tile& tile,
                              const std::uint32_t (&classes)[kGroups]) {
  const int group = tile.row / kMaskBlockRows + threadIdx.x, word = tile.key / kKeys;
  if (threadIdx.x >= kGroups || group >= p.layout.groups()) return;
  std::uint32_t* const line = tile.plane + std::int64_t{group} * p.layout.class_words();
  line[word] = classes[threadIdx.x];
  if (tile.last_keys && word + 1 < p.layout.class_words()) line[word + 1] = kClassesOfNothing;
}

__global__ void __launch_bounds__(kThreads, 4) dense_mask_kernel(const Params p) {
  __shared__ Lines lines;
  __shared__ std::uint32_t classes[kGroups];
  const Tile tile = tile_of(p, blockIdx.x);
  if (threadIdx.x < kGroups) classes[threadIdx.x] = 0;
  pack_tile(p, tile, lines);
  __syncthreads();
  write_bits(p, tile, lines);
  write_columns(p, tile, lines, classes);
  if (tile.last && threadIdx.x < DenseMaskLayout::kPadding) {
    tile.plane[p.layout.words() - DenseMaskLayout::kPadding + threadIdx.x] = 0;
  }
  __syncthreads();
  write_classes(p, tile, classes);
}

}  // namespace

Status launch_dense_mask(const DenseMaskProblem& problem, cudaStream_t stream) {
  const Shape& s = problem.shape;
  const std::int64_t planes = s.batch * s.num_heads_q;
  if (planes == 0) return {};
  const MaskTiles tiles = mask_tiles(s);
  const Params p{problem.mask,
                 static_cast<std::uint64_t>(planes * s.seqlen_q * s.seqlen_k),
                 reinterpret_cast<std::uint32_t*>(problem.table),
                 layout_of(problem),
                 static_cast<unsigned>(tiles.of_rows),
                 static_cast<unsigned>(tiles.of_keys)};
  const auto grid = static_cast<unsigned>(planes * tiles.of_rows * tiles.of_keys);
  return launch_kernel("dense_mask_kernel", dense_mask_kernel, dim3(grid), kThreads, 0, stream, p);
}

}  // namespace jax_fa3
