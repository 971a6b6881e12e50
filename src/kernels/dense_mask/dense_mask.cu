// The table of a mask in one pass over it: a thread block makes all of the table that is of 128
// rows and 256 keys.
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
constexpr int kBlocks = 4;  // of a multiprocessor: 128 KB of the mask are on their way
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
  int rows, seqlen_k;

  // Of the layout, worked out once.
  std::int64_t words, bits, columns;
  int groups, class_words, key_words, row_words;

  unsigned tiles_of_rows, tiles_of_keys;
};

// A thread block's part of a plane.
struct Tile {
  std::uint32_t* plane;
  std::uint64_t first;  // byte of the mask
  int row, key;         // the first ones
  int rows, keys;       // how many are there
  bool last_keys;       // of all tiles of these rows
  bool last;            // of all tiles of the plane
  bool has_rest;        // the mask ends in it, within a packet

  // Where in a packet a row begins.
  __device__ unsigned begin_of_row(const Params& p, unsigned i) const {
    return (static_cast<unsigned>(first) + i * static_cast<unsigned>(p.seqlen_k)) % kPacket;
  }
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
  tile.rows = min(p.rows - tile.row, kRows);
  tile.keys = min(p.seqlen_k - tile.key, kKeys);
  tile.plane = p.table + plane * p.words;
  tile.first = (plane * p.rows + tile.row) * p.seqlen_k + tile.key;
  tile.last_keys = of_keys == p.tiles_of_keys - 1;
  tile.last = tile.last_keys && of_rows == p.tiles_of_rows - 1;
  const std::uint64_t end = tile.first + (tile.rows - 1) * std::int64_t{p.seqlen_k} + tile.keys;
  tile.has_rest = end > p.bytes / kPacket * kPacket;
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

// Of a tile each row from the packet on that it begins in, so that a row that begins within one has
// one more. Rows and packets that are not there have no bits.
struct Lines {
  std::uint32_t words[kRows][kKeyWords + 1];

  __device__ void store(int row, int packet, std::uint32_t bits) {
    reinterpret_cast<std::uint16_t*>(words[row])[packet] = static_cast<std::uint16_t>(bits);
  }
  // 32 keys of a row that begins at bit `begin` of its line. Keys behind the row's last may have
  // any bit. Of the words that are read, what no packet has is shifted out.
  __device__ std::uint32_t bits(int row, int word, unsigned begin) const {
    return __funnelshift_r(words[row][word], words[row][word + 1], begin);
  }
};

// A packet of a row, from the packet on that it begins in.
struct Place {
  std::uint64_t index;  // in the mask
  bool is_there;
};
__device__ Place place_of(const Params& p, const Tile& tile, int row, int packet) {
  const std::uint64_t begin = tile.first + static_cast<std::uint64_t>(row) * p.seqlen_k;
  const std::uint64_t index = begin / kPacket + packet;
  return {index, row < tile.rows && index * kPacket < begin + tile.keys};
}

// The mask's last bytes, if they are no whole packet, into the lines that have them.
__device__ void pack_rest(const Params& p, const Tile& tile, Lines& lines) {
  const std::uint64_t whole = p.bytes / kPacket;
  const int rest = p.bytes % kPacket;
  std::uint32_t bits = 0;
  for (int i = 0; i < rest; ++i) bits |= (p.mask[whole * kPacket + i] != 0 ? 1u : 0u) << i;
  const int row = threadIdx.x;
  for (int packet = 0; packet <= kPackets && row < kRows; ++packet) {
    const Place place = place_of(p, tile, row, packet);
    if (place.is_there && place.index == whole) lines.store(row, packet, bits);
  }
}

__device__ void pack_tile(const Params& p, const Tile& tile, Lines& lines) {
  const auto* const packets = reinterpret_cast<const uint4*>(p.mask);
  const std::uint64_t whole = p.bytes / kPacket;

  const int packet = threadIdx.x % kPackets, row = threadIdx.x / kPackets;
  const Place place = place_of(p, tile, row, packet);
  const std::int64_t step = kRowsAtOnce / kPacket * std::int64_t{p.seqlen_k};  // packets
  int count = place.is_there ? ceil_div(tile.rows - row, kRowsAtOnce) : 0;
  if (tile.has_rest && count > 0 && place.index + (count - 1) * step == whole) --count;
  uint4 bytes[kRowsOfThread];
  const uint4* from = packets + place.index;
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {
    bytes[i] = i < count ? __ldcs(from) : uint4{};
    from += step;
  }
  // The one more that rows have which begin within a packet.
  if (p.seqlen_k % kPacket != 0 && threadIdx.x < kRows) {
    const Place more = place_of(p, tile, threadIdx.x, kPackets);
    const bool is_whole = more.is_there && more.index < whole;
    lines.store(threadIdx.x, kPackets, pack(is_whole ? __ldcs(packets + more.index) : uint4{}));
  }
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {
    lines.store(row + kRowsAtOnce * i, packet, pack(bytes[i]));
  }
  if (tile.has_rest) {
    __syncthreads();
    pack_rest(p, tile, lines);
  }
}

// ---- the parts of a table

__device__ void write_bits(const Params& p, const Tile& tile, const Lines& lines) {
  const int word = threadIdx.x % kKeyWords, first = threadIdx.x / kKeyWords;
  const int of_line = tile.key / 32 + word;
  if (of_line >= p.key_words) return;
  const std::uint32_t there = lowest_bits(tile.keys - 32 * word);
  constexpr int kStep = kThreads / kKeyWords;
  static_assert(kStep % kPacket == 0, "a thread's rows begin at the same place of a packet");
  const unsigned begin = tile.begin_of_row(p, first);
  std::uint32_t* bits =
      tile.plane + p.bits + std::int64_t{tile.row + first} * p.key_words + of_line;
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const int row = first + kStep * i;
    const std::uint32_t of_row = lines.bits(row, word, begin) & there;
    if (row < tile.rows) *bits = of_row;
    bits += std::int64_t{kStep} * p.key_words;
  }
}

// Of a warp: bit i of lane k becomes bit k of lane i. Each step exchanges two quarters of every
// square of 2 * step bits.
__device__ std::uint32_t transpose(std::uint32_t x, int lane) {
  constexpr std::uint32_t kLower[] = {0x55555555, 0x33333333, 0x0f0f0f0f, 0x00ff00ff, 0x0000ffff};
#pragma unroll
  for (int i = 4; i >= 0; --i) {
    const int step = 1 << i, upper = lane & step;
    const std::uint32_t other = __shfl_xor_sync(kAll, x, step);
    const std::uint32_t kept = kLower[i] << upper;
    x = (x & kept) | (__funnelshift_l(other, other, step - 2 * upper) & ~kept);
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

// The columns; and of each group a warp's blocks, two of them, as a byte of `classes`.
__device__ void write_columns(const Params& p, const Tile& tile, const Lines& lines,
                              std::uint8_t (&classes)[kGroups][kKeyWords]) {
  const int lane = threadIdx.x % 32, word = threadIdx.x / 32;
  const std::uint32_t there = lowest_bits(tile.keys - 32 * word);
  const unsigned begin = tile.begin_of_row(p, lane);
  std::uint32_t columns[kRowWords];
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    std::uint32_t any = 0, all = kAll;
#pragma unroll
    for (int i = group * kMaskBlockRows / 32; i < (group + 1) * kMaskBlockRows / 32; ++i) {
      const int row = 32 * i + lane;
      const std::uint32_t bits = lines.bits(row, word, begin) & there;
      any |= bits;
      if (row < tile.rows) all &= bits | ~there;
      columns[i] = transpose(bits, lane);
    }
    any = __reduce_or_sync(kAll, any);
    all = __reduce_and_sync(kAll, all);
    const auto class_of = [&](int block) {
      const std::uint32_t keys = 0xffffu << 16 * block;
      return ((any & keys) != 0 ? 1 : 0) | ((all & keys) == keys ? 2 : 0);
    };
    if (lane == 0) classes[group][word] = class_of(0) | class_of(1) << 2;
  }

  // One row is all rows.
  if (p.rows == 1) columns[0] = (columns[0] & 1) != 0 ? kAll : 0;
  static_assert(kRowWords == 4);
  transpose_words(columns, lane);
  const int of_line = tile.row / 32 + lane % 4;
  const int key = 32 * word + lane / 4 * 4;
  const int keys = of_line < p.row_words ? tile.keys - key : 0;
  std::uint32_t* out =
      tile.plane + p.columns + std::int64_t{tile.key + key} * p.row_words + of_line;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < keys) *out = columns[i];
    out += p.row_words;
  }
}

// A line of classes has a word more than there are tiles.
__device__ void write_classes(const Params& p, const Tile& tile,
                              const std::uint8_t (&classes)[kGroups][kKeyWords]) {
  const int of_tile = threadIdx.x, group = tile.row / kMaskBlockRows + of_tile;
  if (of_tile >= kGroups || group >= p.groups) return;
  std::uint32_t of_blocks = 0;
#pragma unroll
  for (int word = 0; word < kKeyWords; ++word) of_blocks |= classes[of_tile][word] << 4 * word;
  const int word = tile.key / kKeys;
  std::uint32_t* const line = tile.plane + std::int64_t{group} * p.class_words;
  line[word] = of_blocks;
  if (tile.last_keys && word + 1 < p.class_words) line[word + 1] = kClassesOfNothing;
}

__global__ void __launch_bounds__(kThreads, kBlocks) dense_mask_kernel(const Params p) {
  __shared__ Lines lines;
  __shared__ std::uint8_t classes[kGroups][kKeyWords];
  const Tile tile = tile_of(p, blockIdx.x);
  pack_tile(p, tile, lines);
  __syncthreads();
  write_bits(p, tile, lines);
  write_columns(p, tile, lines, classes);
  if (tile.last && threadIdx.x < DenseMaskLayout::kPadding) {
    tile.plane[p.words - DenseMaskLayout::kPadding + threadIdx.x] = 0;
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
  const DenseMaskLayout layout = layout_of(problem);
  Params p;
  p.mask = problem.mask;
  p.bytes = planes * s.seqlen_q * s.seqlen_k;
  p.table = reinterpret_cast<std::uint32_t*>(problem.table);
  p.rows = layout.rows;
  p.seqlen_k = layout.seqlen_k;
  p.words = layout.words();
  p.bits = layout.bits();
  p.columns = layout.columns();
  p.groups = layout.groups();
  p.class_words = layout.class_words();
  p.key_words = layout.key_words();
  p.row_words = layout.row_words();
  p.tiles_of_rows = static_cast<unsigned>(tiles.of_rows);
  p.tiles_of_keys = static_cast<unsigned>(tiles.of_keys);
  const auto grid = static_cast<unsigned>(planes * tiles.of_rows * tiles.of_keys);
  return launch_kernel("dense_mask_kernel", dense_mask_kernel, dim3(grid), kThreads, 0, stream, p);
}

}  // namespace jax_fa3
