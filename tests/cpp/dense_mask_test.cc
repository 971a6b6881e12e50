// What a table says of tiles, rows and keys, against the mask that it was made of, pair by pair.
#include "attention/dense_mask.h"

#include <algorithm>
#include <random>
#include <vector>

#include "call/text.h"
#include "check.h"

namespace jax_fa3 {
namespace {

constexpr std::uint32_t kPoison = 0xdeadbeef;

struct Mask {
  int rows, seqlen_k;
  std::vector<char> pairs;

  bool sees(int row, int key) const {
    return pairs[static_cast<std::size_t>(row) * seqlen_k + key] != 0;
  }
  // Of the rows and the keys that are there.
  TileClass classify(int row, int num_rows, int key, int num_keys) const {
    TileClass tile{false, true};
    const int begin = rows == 1 ? 0 : row;
    for (int i = begin; i < std::min(begin + num_rows, rows); ++i) {
      for (int j = key; j < std::min(key + num_keys, seqlen_k); ++j) {
        tile.any |= sees(i, j);
        tile.all &= sees(i, j);
      }
    }
    return tile;
  }
};

// Stretches of 0 to 99 pairs that are seen or not, in the order of memory; of some masks a half or
// most of the pairs, one by one.
Mask random_mask(int rows, int seqlen_k, std::mt19937& random) {
  Mask mask{rows, seqlen_k, {}};
  mask.pairs.resize(static_cast<std::size_t>(rows) * seqlen_k);
  const unsigned kind = random() % 4;
  bool seen = false;
  int left = 0;
  for (char& pair : mask.pairs) {
    if (left-- == 0) left = random() % 100, seen = !seen;
    pair = kind == 0 ? random() % 2 : kind == 1 ? random() % 800 != 0 : kind == 2 ? seen : 1;
  }
  return mask;
}

std::vector<std::uint32_t> table_of(const Mask& mask) {
  const DenseMaskLayout layout{mask.rows, mask.seqlen_k};
  std::vector<std::uint32_t> words(layout.words() + 1, 0);
  words.back() = kPoison;
  constexpr int kBlocksOfWord = 32 / 2;
  for (int group = 0; group < layout.groups(); ++group) {
    for (int block = 0; block < layout.class_words() * kBlocksOfWord; ++block) {
      const TileClass of_block = mask.classify(group * kMaskBlockRows, kMaskBlockRows,
                                               block * kMaskBlockKeys, kMaskBlockKeys);
      const std::uint32_t two = (of_block.any ? 1 : 0) | (of_block.all ? 2 : 0);
      words[group * layout.class_words() + block / kBlocksOfWord] |= two
                                                                     << block % kBlocksOfWord * 2;
    }
  }
  for (int i = 0; i < mask.rows; ++i) {
    for (int j = 0; j < mask.seqlen_k; ++j) {
      if (!mask.sees(i, j)) continue;
      words[layout.bits() + std::int64_t{i} * layout.key_words() + j / 32] |= 1u << j % 32;
      words[layout.columns() + std::int64_t{j} * layout.row_words() + i / 32] |=
          mask.rows == 1 ? ~0u : 1u << i % 32;
    }
  }
  return words;
}

// As classify() with the rows' number known to the compiler.
TileClass classify_at_once(const DenseMask& dense, int row, int num_rows, int key, int num_keys) {
  if (num_rows == 64) return dense.classify<64>(row, key, num_keys);
  if (num_rows == 128) return dense.classify<128>(row, key, num_keys);
  return dense.classify<192>(row, key, num_keys);
}

void classes_are_those_of_the_pairs(const Mask& mask, const DenseMask& dense, int seqlen_q) {
  for (const int num_rows : {64, 128, 192}) {
    for (const int num_keys : {16, 64, 80, 96, 128}) {
      for (int row = 0; row < seqlen_q; row += 64) {
        for (int key = 0; key < mask.seqlen_k; key += 16) {
          const TileClass got = dense.classify(row, num_rows, key, num_keys);
          const TileClass expected = mask.classify(row, num_rows, key, num_keys);
          const TileClass at_once = classify_at_once(dense, row, num_rows, key, num_keys);
          CHECK(at_once.any == got.any && at_once.all == got.all);
          CHECK_DETAIL(got.any == expected.any && got.all == expected.all,
                       concat(mask.rows, " x ", mask.seqlen_k, ": ", num_rows, " rows from ", row,
                              ", ", num_keys, " keys from ", key));
        }
      }
    }
  }
}

void lines_are_the_pairs(const Mask& mask, const DenseMask& dense, int seqlen_q) {
  for (int i = 0; i < seqlen_q; ++i) {
    for (int j = 0; j < mask.seqlen_k; ++j) {
      const bool sees = mask.sees(mask.rows == 1 ? 0 : i, j);
      const std::uint32_t of_row = dense.row_bits(i)[j / 32];
      const std::uint32_t of_key = dense.key_bits(j)[i / 32 * dense.key_bits_step()];
      CHECK((of_row >> j % 32 & 1) == (sees ? 1u : 0u));
      CHECK((of_key >> i % 32 & 1) == (sees ? 1u : 0u));
    }
  }
}

void reads_what_was_written() {
  std::mt19937 random(0);
  for (const int seqlen_k : {1, 16, 31, 100, 256, 257, 512, 700}) {
    for (const int rows : {1, 33, 64, 65, 200}) {
      const Mask mask = random_mask(rows, seqlen_k, random);
      const auto words = table_of(mask);
      const DenseMask dense{words.data(), {rows, seqlen_k}};
      const int seqlen_q = rows == 1 ? 130 : rows;
      classes_are_those_of_the_pairs(mask, dense, seqlen_q);
      lines_are_the_pairs(mask, dense, seqlen_q);
      CHECK(words.back() == kPoison);
      for (int i = 0; i < DenseMaskLayout::kPadding; ++i) CHECK(words[words.size() - 2 - i] == 0);
    }
  }
}

void without_a_mask_all_is_seen() {
  const TileClass tile = DenseMask{}.classify(64, 64, 128, 128);
  CHECK(tile.any && tile.all);
  const TileClass at_once = DenseMask{}.classify<64>(64, 128, 128);
  CHECK(at_once.any && at_once.all);
}

// By the formulas of 64-bit numbers, up to the longest lines.
void sizes() {
  CHECK((DenseMaskLayout{65, 300}.words() == 2 * 3 + 65 * 10 + 300 * 3 + 8));
  CHECK((DenseMaskLayout{1, kMaxSeqlen}.words() ==
         (kMaxSeqlen / 256 + 1) + kMaxSeqlen / 32 + std::int64_t{kMaxSeqlen} + 8));
  const std::int64_t n = kMaxSeqlen;
  CHECK((DenseMaskLayout{kMaxSeqlen, kMaxSeqlen}.words() ==
         n / 64 * (n / 256 + 1) + 2 * n * (n / 32) + 8));
}

}  // namespace
}  // namespace jax_fa3

int main() {
  jax_fa3::reads_what_was_written();
  jax_fa3::without_a_mask_all_is_seen();
  jax_fa3::sizes();
  return jax_fa3::test::finish();
}
