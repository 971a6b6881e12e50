// The mask's tile ranges against the definition, row by key, for all small problems: no visible
// pair lies outside the visited tiles, no invisible one in a tile that is not cut, and the view
// from the queries and the view from the keys agree.
#include "attention/mask.h"

#include <vector>

#include "call/text.h"
#include "check.h"

namespace jax_fa3 {
namespace {

constexpr int kMaxSeqlenQ = 5;
constexpr int kMaxSeqlenK = 6;
const std::vector<std::pair<int, int>> kBlocks = {{1, 1}, {2, 3}, {3, 2}, {4, 4}, {8, 2}};

std::string describe(const Mask& mask, int block_m, int block_n, int row_block, int key_block) {
  return concat("lengths ", mask.query_length, " ", mask.key_length, " band ", mask.first, "..",
                mask.last, " blocks ", block_m, "x", block_n, " at ", row_block, ",", key_block);
}

struct Seen {
  bool any = false;
  bool all = true;  // of the rows and keys that exist
};

Seen look(const Mask& mask, int row_begin, int row_end, int key_begin, int key_end) {
  Seen seen;
  for (int row = row_begin; row < row_end; ++row) {
    for (int key = key_begin; key < key_end; ++key) {
      const bool kept = mask.keeps(row, key);
      seen.any |= kept;
      seen.all &= kept || row >= mask.query_length;
    }
  }
  return seen;
}

void check_range(const TileRange& range, int num_tiles) {
  CHECK(range.begin >= 0 && range.begin <= range.full_begin);
  CHECK(range.full_begin <= range.full_end && range.full_end <= range.end);
  CHECK(range.end <= num_tiles);
}

void check_mask(const Mask& mask, int seqlen_q, int seqlen_k, int block_m, int block_n) {
  const int m_blocks = ceil_div(seqlen_q, block_m);
  const int n_blocks = ceil_div(seqlen_k, block_n);
  std::vector<TileRange> of_keys(n_blocks);
  for (int n = 0; n < n_blocks; ++n) {
    of_keys[n] = mask.query_tiles(n * block_n, (n + 1) * block_n, block_m);
    check_range(of_keys[n], m_blocks);
  }
  for (int m = 0; m < m_blocks; ++m) {
    const int row = m * block_m;
    const TileRange range = mask.key_tiles(row, row + block_m, block_n);
    check_range(range, n_blocks);
    for (int n = 0; n < n_blocks; ++n) {
      const Seen seen = look(mask, row, row + block_m, n * block_n, (n + 1) * block_n);
      const auto visited_uncut = [](const TileRange& r, int tile) {
        return tile >= r.begin && tile < r.end && !r.cuts(tile);
      };
      const auto visited = [](const TileRange& r, int tile) {
        return tile >= r.begin && tile < r.end;
      };
      const std::string where = describe(mask, block_m, block_n, m, n);
      CHECK_DETAIL(!seen.any || visited(range, n), where);
      CHECK_DETAIL(!seen.any || visited(of_keys[n], m), where);
      CHECK_DETAIL(seen.all || !visited_uncut(range, n), where);
      CHECK_DETAIL(seen.all || !visited_uncut(of_keys[n], m), where);
    }
  }
}

void all_small_problems() {
  const std::vector<int> windows = {0, 1, 2, 5, kUnbounded};
  for (int seqlen_q = 0; seqlen_q <= kMaxSeqlenQ; seqlen_q += seqlen_q < 3 ? 1 : 2) {
    for (int seqlen_k = 0; seqlen_k <= kMaxSeqlenK; ++seqlen_k) {
      for (const int left : windows) {
        for (const int right : windows) {
          for (int offset = -7; offset <= 7; ++offset) {
            for (int query_length = 0; query_length <= seqlen_q; ++query_length) {
              for (int key_length = 0; key_length <= seqlen_k; ++key_length) {
                const Mask mask{query_length, key_length, offset - left, offset + right};
                for (const auto& [block_m, block_n] : kBlocks) {
                  check_mask(mask, seqlen_q, seqlen_k, block_m, block_n);
                }
              }
            }
          }
        }
      }
    }
  }
}

// Ranges are tight where it matters for speed: a dense problem without ragged edges is never cut,
// and a causal one only on the diagonal.
void tightness() {
  const Mask dense{256, 256, -kUnbounded, kUnbounded};
  const Mask causal{256, 256, -kUnbounded, 0};
  for (int row = 0; row < 256; row += 64) {
    const TileRange all = dense.key_tiles(row, row + 64, 64);
    CHECK(all.begin == 0 && all.end == 4 && all.full_begin == 0 && all.full_end == 4);
    const TileRange below = causal.key_tiles(row, row + 64, 64);
    CHECK(below.begin == 0 && below.end == row / 64 + 1);
    CHECK(below.full_begin == 0 && below.full_end == row / 64);
    const TileRange after = causal.query_tiles(row, row + 64, 64);
    CHECK(after.begin == row / 64 && after.end == 4);
    CHECK(after.full_begin == row / 64 + 1 && after.full_end == 4);
  }
}

// Values that come from memory are clamped, and the extremes do not overflow.
void made_from_arrays() {
  const std::int32_t wild[] = {-2147483647 - 1, -5, 0, 3, 7, 8, 2147483647};
  for (int b = 0; b < 7; ++b) {
    IndexArrays index;
    index.query_lengths = index.key_lengths = index.query_offset = wild;
    for (const int left : {0, kUnbounded}) {
      for (const int right : {0, kUnbounded}) {
        const Mask mask = make_mask({left, right, 99}, index, b, 7, 5);
        CHECK(mask.query_length == (wild[b] < 0 ? 0 : wild[b] > 7 ? 7 : wild[b]));
        CHECK(mask.key_length == (wild[b] < 0 ? 0 : wild[b] > 5 ? 5 : wild[b]));
        check_mask(mask, 7, 5, 2, 3);
      }
    }
  }
  const Mask absent = make_mask({1, 2, 3}, IndexArrays{}, 0, 7, 5);
  CHECK(absent.query_length == 7 && absent.key_length == 5);
  CHECK(absent.first == 2 && absent.last == 5);
  for (const int offset : {-kMaxSeqlen, kMaxSeqlen}) {
    const Mask far =
        make_mask({kUnbounded, kUnbounded, offset}, IndexArrays{}, 0, kMaxSeqlen, kMaxSeqlen);
    const TileRange range = far.key_tiles(kMaxSeqlen - 128, kMaxSeqlen, 128);
    CHECK(range.begin == 0 && range.end == kMaxSeqlen / 128 && range.full_end == range.end);
  }
}

}  // namespace
}  // namespace jax_fa3

int main() {
  jax_fa3::all_small_problems();
  jax_fa3::tightness();
  jax_fa3::made_from_arrays();
  return jax_fa3::test::finish();
}
