// A dense boolean mask as the kernels read it: a table in device memory (kernels/dense_mask makes
// it) with a plane for each (sequence, head) of the mask. A plane has, one after the other,
//
//   classes  [rows / 64, up][class_words]  of each block of 64 rows and 16 keys two bits: whether
//                                          any pair of it is seen, and whether all are; the block
//                                          of keys 16 i is in word i / 16, from bit 2 (i % 16)
//   bits     [rows][key_words]             of each row a bit for each key, the first the lowest
//   columns  [seqlen_k][row_words]         of each key a bit for each row
//   padding  [kPadding]
//
// A mask of one row serves all rows; its columns are words of ones or of zeros. Rows and keys that
// are not there are not seen, but do not keep a block from being seen as a whole. Lines are read a
// tile at a time: past its end a line goes on with the next one, and the last with the padding;
// whoever reads masks such rows and keys by their number.
//
// Pure arithmetic for host and device.
#pragma once

#include <cstdint>

#include "call/types.h"

namespace jax_fa3 {

constexpr int kMaskBlockRows = 64;
constexpr int kMaskBlockKeys = 16;

// Where the parts of a plane are, in words of 32 bits; a plane has fewer than 2^31 of them.
struct DenseMaskLayout {
  int rows;  // seqlen_q, or 1 for all rows
  int seqlen_k;

  static constexpr int kPadding = 8;

  // One more than the blocks take: words are read in pairs.
  JFA_HD int class_words() const { return ceil_div(seqlen_k, 16 * kMaskBlockKeys) + 1; }
  JFA_HD int groups() const { return ceil_div(rows, kMaskBlockRows); }
  JFA_HD int key_words() const { return ceil_div(seqlen_k, 32); }
  JFA_HD int row_words() const { return ceil_div(rows, 32); }

  JFA_HD int bits() const { return groups() * class_words(); }
  JFA_HD int columns() const { return bits() + rows * key_words(); }
  JFA_HD std::int64_t words() const {  // of any extents
    return std::int64_t{groups()} * class_words() + std::int64_t{rows} * key_words() +
           std::int64_t{seqlen_k} * row_words() + kPadding;
  }
};

// What a mask says of a tile.
struct TileClass {
  bool any = true;  // some pair is seen
  bool all = true;  // all of them are
};

// The plane of one (batch, head), or none.
struct DenseMask {
  const std::uint32_t* words = nullptr;
  DenseMaskLayout layout{};

  // Of rows [row, row + rows) and keys [key, key + keys): whole blocks, 128 keys at most, from a
  // row and a key that are there.
  JFA_HD TileClass classify(int row, int rows, int key, int keys) const {
    if (words == nullptr) return {};
    const std::uint32_t blocks = (std::uint64_t{1} << keys / kMaskBlockKeys * 2) - 1;
    const int word = key / (16 * kMaskBlockKeys), bit = key / kMaskBlockKeys % 16 * 2;
    const bool one_row = layout.rows == 1;
    int group = one_row ? 0 : row / kMaskBlockRows;
    const int end = one_row ? 1 : (row + rows) / kMaskBlockRows;
    std::uint32_t any = 0, all = blocks;
    JFA_ROLLED
    for (; group < end && group < layout.groups(); ++group) {
      const std::uint32_t* const line = words + group * layout.class_words() + word;
      const std::uint64_t both = line[0] | std::uint64_t{line[1]} << 32;
      const auto of_blocks = static_cast<std::uint32_t>(both >> bit);
      any |= of_blocks;
      all &= of_blocks;
    }
    return class_of(any, all, blocks);
  }

  // The same of kRows rows, whose words are all asked for before one is waited for.
  template <int kRows>
  JFA_HD TileClass classify(int row, int key, int keys) const {
    if (words == nullptr) return {};
    constexpr int kGroups = kRows / kMaskBlockRows;
    const int word = key / (16 * kMaskBlockKeys), bit = key / kMaskBlockKeys % 16 * 2;
    // Groups that are not there repeat the last one.
    const std::uint32_t* lines[kGroups];
    std::uint32_t low[kGroups], high[kGroups];
    for (int i = 0; i < kGroups; ++i) {
      const int group = row / kMaskBlockRows + i, last = layout.groups() - 1;
      lines[i] = words + (group < last ? group : last) * layout.class_words() + word;
    }
    for (int i = 0; i < kGroups; ++i) {
      low[i] = lines[i][0];
      high[i] = lines[i][1];
    }
    const std::uint32_t blocks = (std::uint64_t{1} << keys / kMaskBlockKeys * 2) - 1;
    std::uint32_t any = 0, all = blocks;
    for (int i = 0; i < kGroups; ++i) {
      const auto of_blocks =
          static_cast<std::uint32_t>((low[i] | std::uint64_t{high[i]} << 32) >> bit);
      any |= of_blocks;
      all &= of_blocks;
    }
    return class_of(any, all, blocks);
  }

  // The lines of a row and of a key, and their words from one to the next column of 32.
  JFA_HD const std::uint32_t* row_bits(int row) const {
    return words + layout.bits() + (layout.rows == 1 ? 0 : row * layout.key_words());
  }
  JFA_HD const std::uint32_t* key_bits(int key) const {
    return words + layout.columns() + key * layout.row_words();
  }
  JFA_HD int key_bits_step() const { return layout.rows == 1 ? 0 : 1; }

 private:
  // Of the classes of `blocks`, what any of their groups has and what all have.
  JFA_HD static TileClass class_of(std::uint32_t any, std::uint32_t all, std::uint32_t blocks) {
    constexpr std::uint32_t kAny = 0x55555555, kAll = 0xaaaaaaaa;
    return {(any & blocks & kAny) != 0, (all & blocks & kAll) == (blocks & kAll)};
  }
};

}  // namespace jax_fa3
