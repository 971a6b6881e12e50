// The mask's tile ranges against the definition, row by key, for all small problems: no visible
// pair lies outside the visited tiles, no invisible one in a tile that is not cut, and the view
// from the queries and the view from the keys agree.
#include "attention/mask.h"

#include <algorithm>
#include <random>
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

// A table as attention/visibility.h describes it, by the definition; an interval for each row.
std::vector<std::int32_t> table_of(const std::vector<Interval>& rows, int seqlen_k) {
  const int seqlen_q = static_cast<int>(rows.size());
  const PlaneLayout layout{seqlen_q, seqlen_k};
  std::vector<std::int32_t> words(layout.words(), 0);
  const PlaneView<std::int32_t> plane{words.data(), layout};
  const auto sees = [&](int row, int key) { return key >= rows[row].begin && key < rows[row].end; };
  const auto add = [](Bounds& bounds, int begin, int end) {
    bounds.add(begin < end ? Bounds{begin, begin, end, end} : Bounds{kNone, kNone, 0, 0});
  };
  Plane& summary = plane.summary();
  summary = {Plane::kValid | Plane::kMonotone, 0, 0, 0};
  int begin = 0, end = 0;
  for (int row = 0; row < seqlen_q; ++row) {
    Bounds& bounds = plane.row_bounds()[row / kBoundsRows];
    if (row % kBoundsRows == 0) bounds = Bounds::none();
    add(bounds, rows[row].begin, rows[row].end);
    plane.rows()[row] = rows[row];
    if (rows[row].begin >= rows[row].end) continue;
    if (rows[row].begin < begin || rows[row].end < end) summary.flags &= ~Plane::kMonotone;
    begin = std::max(begin, rows[row].begin);
    end = std::max(end, rows[row].end);
    summary.rows_end = row + 1;
    summary.keys_end = end;
  }
  for (int key = 0; key < seqlen_k; ++key) {
    Bounds& bounds = plane.key_bounds()[key / kBoundsRows];
    if (key % kBoundsRows == 0) bounds = Bounds::none();
    int first = 0, last = -1;
    for (int row = seqlen_q - 1; row >= 0; --row) {
      if (!sees(row, key)) continue;
      first = row;
      if (last < 0) last = row;
    }
    plane.keys()[key] = {first, last + 1};
    add(bounds, first, last + 1);
    if (!(summary.flags & Plane::kMonotone)) bounds.add({0, kNone, 0, 0});
  }
  return words;
}

// Row intervals of any kind, with windows and lengths: no visible pair is outside of the tiles that
// are visited, and none that is invisible in a tile that is not cut.
void row_intervals() {
  std::mt19937 random(0);
  const auto number = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  for (int problem = 0; problem < 200; ++problem) {
    const int seqlen_q = number(1, 300), seqlen_k = number(1, 300);
    const bool documents = number(0, 2) > 0;
    std::vector<Interval> rows(seqlen_q);
    Interval keys{0, 0};
    for (Interval& row : rows) {
      if (documents) {
        if (number(0, 40) == 0) keys = {keys.end, std::min(keys.end + number(0, 120), seqlen_k)};
        row = keys;
      } else {
        row = {number(0, seqlen_k), number(0, seqlen_k)};
      }
    }
    const auto words = table_of(rows, seqlen_k);
    IndexArrays index;
    index.visibility = words.data();
    const int unbounded = number(0, 1) ? kUnbounded : 0;
    const MaskOptions options{number(0, 100) + unbounded / 2, number(0, 1) ? 0 : kUnbounded,
                              number(-40, 40)};
    Mask mask = make_mask(options, index, 0, seqlen_q, seqlen_k);
    const PlaneLayout layout{seqlen_q, seqlen_k};
    Intervals intervals;
    read_intervals(intervals, mask, index, 0, {}, layout);
    const auto sees = [&](int row, int key) {
      return mask.keeps(row, key) && key >= rows[row].begin && key < rows[row].end;
    };
    const auto check = [&](const TileRange& range, int tile, bool any, bool all, const char* who) {
      const bool visited = tile >= range.begin && tile < range.end;
      CHECK_DETAIL(!any || visited, concat(who, " problem ", problem, " tile ", tile));
      CHECK_DETAIL(!visited || range.cuts(tile) || all, concat(who, " problem ", problem));
    };
    for (const int block_n : {64, 80, 96, 128}) {
      for (int row = 0; row < seqlen_q; row += 64) {
        const Bounds seen = intervals.of_rows(layout, row, row + 64);
        const TileRange range = mask.key_tiles(row, row + 64, block_n, seen);
        check_range(range, ceil_div(seqlen_k, block_n));
        for (int n = 0; n * block_n < seqlen_k; ++n) {
          bool any = false, all = true;
          for (int i = row; i < std::min(row + 64, mask.query_length); ++i) {
            for (int j = n * block_n; j < (n + 1) * block_n; ++j) {
              const bool seen_here = j < seqlen_k && sees(i, j);
              any |= seen_here;
              all &= seen_here;
            }
          }
          check(range, n, any, all, "rows");
        }
      }
    }
    for (const int block_n : {64, 128}) {
      for (int key = 0; key < seqlen_k; key += block_n) {
        const Bounds seen = intervals.of_keys(layout, key, key + block_n, 1);
        const TileRange range = mask.query_tiles(key, key + block_n, 64, seen);
        check_range(range, ceil_div(seqlen_q, 64));
        for (int m = 0; m * 64 < seqlen_q; ++m) {
          bool any = false, all = true;
          for (int i = 64 * m; i < std::min(64 * m + 64, seqlen_q); ++i) {
            for (int j = key; j < key + block_n; ++j) {
              const bool seen_here = j < seqlen_k && sees(i, j);
              any |= seen_here;
              // Rows that see nothing take part in nothing, whatever the mask says of them.
              all &= seen_here || rows[i].begin >= rows[i].end || i >= mask.query_length;
            }
          }
          check(range, m, any, all, "keys");
        }
      }
    }
  }
}

// A table of any numbers gives tiles that exist.
void corrupt_tables() {
  std::mt19937 random(1);
  for (int problem = 0; problem < 200; ++problem) {
    const int seqlen_q = 1 + random() % 300, seqlen_k = 1 + random() % 300;
    const PlaneLayout layout{seqlen_q, seqlen_k};
    std::vector<std::int32_t> words(layout.words());
    for (std::int32_t& word : words) word = static_cast<std::int32_t>(random());
    IndexArrays index;
    index.visibility = words.data();
    Mask mask = make_mask({}, index, 0, seqlen_q, seqlen_k);
    Intervals intervals;
    read_intervals(intervals, mask, index, 0, {}, layout);
    CHECK(mask.query_length >= 0 && mask.query_length <= seqlen_q);
    CHECK(mask.key_length >= 0 && mask.key_length <= seqlen_k);
    for (int row = 0; row < seqlen_q; row += 64) {
      check_range(mask.key_tiles(row, row + 64, 80, intervals.of_rows(layout, row, row + 64)),
                  ceil_div(seqlen_k, 80));
    }
    for (int key = 0; key < seqlen_k; key += 64) {
      check_range(mask.query_tiles(key, key + 64, 64, intervals.of_keys(layout, key, key + 64, 1)),
                  ceil_div(seqlen_q, 64));
    }
  }
}

}  // namespace
}  // namespace jax_fa3

int main() {
  jax_fa3::all_small_problems();
  jax_fa3::tightness();
  jax_fa3::made_from_arrays();
  jax_fa3::row_intervals();
  jax_fa3::corrupt_tables();
  return jax_fa3::test::finish();
}
