// The division of a call over caches, emulated on the host: what every CTA is given of random
// problems, which tiles it visits, where its partial results stand, in which order they are folded,
// which pages are looked up.
#include <algorithm>
#include <climits>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "attention/pages.h"
#include "check.h"
#include "kernels/forward_cached/pieces.h"

namespace {

using namespace jax_fa3;

std::mt19937 generator(1234);

int random(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// Index arrays of a call, mostly sound and sometimes hostile.
struct Call {
  CachedExtents extents;
  int tile_keys;
  bool has_columns;  // else blocks are rows
  int heads_at_once;
  int rounds;  // of heads
  int most_least;
  int beside;
  int groups;
  int page_size;
  int table_width;
  int num_pages;
  std::vector<std::int32_t> key_lengths, query_offset, block_tables, query_starts, query_lengths,
      key_starts;

  CachedIndex index() const {
    const auto data = [](const auto& v) { return v.empty() ? nullptr : v.data(); };
    return {key_lengths.data(), query_offset.data(), data(block_tables),
            data(query_starts), data(query_lengths), data(key_starts)};
  }
};

int hostile() {
  constexpr int kValues[] = {INT_MIN, -1, 0, 1, INT_MAX, 1 << 28, -(1 << 28)};
  return kValues[random(0, 6)];
}

Call random_call() {
  Call c;
  const bool ragged = random(0, 2) == 0, hostile_lengths = random(0, 3) == 0;
  const int batch = random(ragged ? 0 : 1, random(0, 1) ? 4 : 80);
  c.heads_at_once = random(1, 8);
  c.groups = random(1, 132 / c.heads_at_once);
  c.page_size = 8 * random(1, 40);
  const bool has_tables = random(0, 1);
  c.table_width = has_tables ? random(1, 30) : 1;
  c.num_pages = has_tables ? random(0, 50) : batch;
  if (!has_tables) c.page_size = random(0, 5000);
  CachedExtents& e = c.extents;
  e.batch = batch;
  e.rows_per_sequence = ragged ? 0 : random(1, 9);
  e.tokens = ragged ? random(0, 300) : batch * e.rows_per_sequence;
  e.heads_per_kv_head = random(1, random(0, 3) ? 8 : 100);
  e.capacity = c.page_size * c.table_width;
  e.window_left = random(0, 2) ? kUnbounded : random(0, 300);
  e.window_right = random(0, 2) ? random(0, 3) : kUnbounded;
  c.has_columns = random(0, 1);
  c.tile_keys = c.has_columns ? kColumnTileKeys : 64 << random(0, 1);
  c.rounds = c.has_columns ? 1 : random(1, 3);
  c.beside = c.has_columns ? 1 : random(1, 4);
  c.most_least = c.has_columns ? Shares<int>::kLeast : random(2, 12);
  e.block_rows = c.has_columns ? 16 << random(0, 2) : 64 * random(2, 3);
  if (!c.has_columns && random(0, 1)) {
    e.rows_per_sequence = ragged ? 0 : random(1, 200);
    e.tokens = ragged ? random(0, 3000) : batch * e.rows_per_sequence;
  }
  const auto fill = [&](std::vector<std::int32_t>& v, int n, int low, int high) {
    for (int i = 0; i < n; ++i) {
      v.push_back(hostile_lengths && random(0, 3) == 0 ? hostile() : random(low, high));
    }
  };
  fill(c.key_lengths, batch, 0, e.capacity);
  fill(c.query_offset, batch, -20, e.capacity);
  if (has_tables) fill(c.block_tables, batch * c.table_width, 0, std::max(0, c.num_pages - 1));
  if (ragged) {
    fill(c.query_starts, batch + 1, 0, e.tokens);
    if (random(0, 2)) std::sort(c.query_starts.begin(), c.query_starts.end());
  }
  if (random(0, 1)) fill(c.query_lengths, batch, 0, 9);
  if (random(0, 1)) fill(c.key_starts, batch, 0, e.capacity);
  return c;
}

// As the scheduling warp reads them.
std::vector<CachedSequence> read_all(const Call& c) {
  std::vector<CachedSequence> all;
  const CachedIndex index = c.index();
  const CachedExtents& e = c.extents;
  int start = 0;
  for (int b = 0; b < e.batch; ++b) {
    int first = b * e.rows_per_sequence, rows = e.rows_per_sequence;
    if (index.query_starts != nullptr) {
      first = start = std::max(start, read_start(index, e, b));
      rows = std::max(start, read_start(index, e, b + 1)) - start;
    }
    all.push_back(make_sequence({index, b}, e, first, rows));
  }
  return all;
}

// The line of a call: what it is divided into, and the pieces that a share of it has.
template <class Units>
struct Line {
  const Call& call;
  const std::vector<CachedSequence>& sequences;
  Units of_round = 0;  // units

  Line(const Call& c, const std::vector<CachedSequence>& sequences)
      : call(c), sequences(sequences) {
    for (const CachedSequence& s : sequences) of_round += units(s);
  }

  Units total() const { return call.rounds * of_round; }

  Units units(const CachedSequence& s) const {
    const CachedExtents& e = call.extents;
    if (call.has_columns) {
      return Units{e.blocks(s.rows)} * (e.seen_by_sequence(s).tiles(call.tile_keys).size() + 1);
    }
    Units all = 0;
    for (int block = 0; block < e.blocks(s.rows); ++block) {
      all += whole_item(e, s, 0, 0, block, call.tile_keys).tiles.size() + call.beside;
    }
    return all;
  }

  // Each item, where a group has one at most (ItemScheduler::is_one_each); else none.
  std::vector<Piece> one_each(const Shares<Units>& shares) const {
    std::vector<Piece> found;
    int longest = 0;
    const CachedExtents& e = call.extents;
    for (int b = 0; b < e.batch; ++b) {
      for (int block = 0; block < e.blocks(sequences[b].rows); ++block) {
        const int head = call.heads_at_once - 1;
        found.push_back(whole_item(e, sequences[b], b, head, block, call.tile_keys));
        longest = std::max(longest, found.back().tiles.size() + call.beside);
      }
    }
    const int items = static_cast<int>(found.size());
    const bool can_be = !call.has_columns && call.rounds == 1 && items <= 32;
    return can_be && shares.are_one_each(items, longest) ? found : std::vector<Piece>{};
  }

  std::vector<Piece> pieces(const Shares<Units>& shares, int group) const {
    std::vector<Piece> found;
    if (const auto all = one_each(shares); !all.empty()) {
      if (group < int(all.size())) found.push_back(all[group]);
      return found;
    }
    const Units from = shares.begin(group), to = shares.begin(group + 1);
    Units begins = 0;
    for (int round = 0; round < call.rounds; ++round) {
      const int head = round * call.heads_at_once + call.heads_at_once - 1;
      for (int b = 0; b < call.extents.batch; ++b) {
        const CachedSequence& s = sequences[b];
        const Units count = units(s);
        if (call.has_columns && count > 0 && begins < to && begins + count > from) {
          PiecesOfSequence<Units> all(call.extents, shares, s, b, head, begins, from, to);
          Portion<Units> portion;
          for (Piece piece; all.next(piece, portion);) {
            piece.parts = shares.parts(portion);
            found.push_back(piece);
          }
        }
        Units base = begins;
        for (int block = 0; !call.has_columns && block < call.extents.blocks(s.rows); ++block) {
          Piece item = whole_item(call.extents, s, b, head, block, call.tile_keys);
          const int of_item = item.tiles.size() + call.beside;
          Portion<Units> portion;
          if (base < to && base + of_item > from &&
              take_part(item, portion, shares, base, from, to)) {
            item.parts = shares.parts(portion);
            found.push_back(item);
          }
          base += of_item;
        }
        begins += count;
      }
    }
    return found;
  }
};

// Whether packed row q of a sequence sees a key, by the definition.
bool sees(const Call& c, int b, const CachedSequence& s, int q, int key) {
  const CachedIndex index = c.index();
  const CachedExtents& e = c.extents;
  const int row = q / e.heads_per_kv_head;
  const std::int64_t offset = std::min<std::int64_t>(
      std::max<std::int64_t>(index.query_offset[b], -kMaxSeqlen), kMaxSeqlen);
  const std::int64_t position = offset + row;
  if (row >= s.rows || (index.query_lengths != nullptr && row >= index.query_lengths[b])) {
    return false;
  }
  if (key < 0 || key >= e.capacity || key >= index.key_lengths[b]) return false;
  if (index.key_starts != nullptr && key < index.key_starts[b]) return false;
  return key >= position - e.window_left && key <= position + e.window_right;
}

template <class Units>
void check_call(const Call& c) {
  const CachedExtents& e = c.extents;
  const auto sequences = read_all(c);
  const Line<Units> line(c, sequences);
  CHECK(line.total() <= most_units(e, c.rounds, c.tile_keys, c.beside));
  const Shares<Units> shares(line.total(), c.groups, c.most_least, c.beside);
  CHECK(shares.groups >= 1 && shares.groups <= c.groups && shares.begin(0) == 0 &&
        shares.begin(shares.groups) == line.total());

  using Item = std::tuple<int, int, int>;  // kv head, sequence, first packed row
  std::map<Item, std::vector<int>> tiles;
  std::map<Item, std::vector<int>> groups;
  std::map<Item, int> parts;
  std::set<std::int64_t> partials;
  std::map<int, Item> counters;
  const int number = c.heads_at_once - 1;
  for (int group = 0; group < shares.groups; ++group) {
    std::int64_t load = 0;
    for (const Piece& piece : line.pieces(shares, group)) {
      const Item item{piece.head, piece.batch, piece.first_row};
      CHECK(piece.first_row % e.block_rows == 0 && piece.rows >= 1 && piece.rows <= e.block_rows &&
            piece.first_row + piece.rows <= e.packed_rows(piece.sequence.rows));
      for (int t = piece.tiles.begin; t < piece.tiles.end; ++t) tiles[item].push_back(t);
      groups[item].push_back(group);
      parts[item] = piece.parts.count;
      load += piece.tiles.size() + c.beside;
      if (piece.is_whole()) continue;
      const int part = group - piece.parts.first_group;
      const int of_sequence = e.seen_by_sequence(piece.sequence).tiles(c.tile_keys).size();
      CHECK(of_sequence >= 2 * shares.least && part >= 0 && part < piece.parts.count &&
            part == int(groups[item].size()) - 1);
      CHECK(c.has_columns || piece.tiles.size() >= shares.least);
      const std::int64_t partial = piece.partial(part, c.heads_at_once, number);
      CHECK(partial >= 0 && partial < 2 * c.groups * c.heads_at_once);
      CHECK(partials.insert(partial).second);
      const int counter = piece.counter(c.heads_at_once, number);
      CHECK(counter >= 0 && counter < c.groups * c.heads_at_once);
      CHECK(counters.emplace(counter, item).first->second == item);
    }
    if (!line.one_each(shares).empty()) {
      CHECK(2 * load <= 3 * shares.share);
      continue;
    }
    CHECK(load <= shares.begin(group + 1) - shares.begin(group) + 2 * shares.least + c.beside +
                      e.blocks(1));
  }

  for (int n = 0; n < c.rounds * e.batch; ++n) {
    const int head = n / e.batch * c.heads_at_once + number, b = n % e.batch;
    const CachedSequence& s = sequences[b];
    CHECK(s.rows >= 0 && s.first_token >= 0 && s.first_token + s.rows <= e.tokens);
    for (int q = 0; q < e.packed_rows(s.rows); q += e.block_rows) {
      const Item item{head, b, q};
      CHECK(int(groups[item].size()) == parts[item]);  // and not 0: somebody writes the rows
      const int end = std::min(q + e.block_rows, e.packed_rows(s.rows));
      const SeenKeys seen = e.seen_by_packed(s, q, end);
      const Range all = seen.tiles(c.tile_keys);
      std::vector<int> expected;
      for (int t = all.begin; t < all.end; ++t) expected.push_back(t);
      CHECK(tiles[item] == expected);  // each once, and parts in the order of keys
      const int first = random(all.begin, all.end), last = random(first, all.end);
      const TileRange visited = seen.visit({first, last}, c.tile_keys);
      CHECK(visited.empty() ? first >= last : visited.begin == first && visited.end == last);
      for (int t = visited.begin; t < visited.end; ++t) {
        CHECK(visited.cuts(t) == seen.cuts(t, c.tile_keys));
      }
      for (int i = 0; i < 6; ++i) {
        const int r = random(q, end - 1), row = r / e.heads_per_kv_head;
        const int key =
            random(0, 2) ? random(0, std::max(1, e.capacity)) : seen.any.begin + random(-2, 2);
        const Range keys = e.row_keys(s, row);
        const bool is_seen = sees(c, b, s, r, key);
        CHECK(is_seen == (key >= keys.begin && key < keys.end));
        if (is_seen) CHECK(key >= seen.any.begin && key < seen.any.end);
        if (!is_seen && row < s.seen_rows && key >= 0 && !expected.empty()) {
          const int tile = key / c.tile_keys;
          CHECK(tile < all.begin || tile >= all.end || seen.cuts(tile, c.tile_keys));
        }
      }
    }
  }
}

// Each key of a box that somebody sees is in the page that the table says; no other entry is read.
void check_pages(const Call& c) {
  const CachedExtents& e = c.extents;
  CacheShape cache;
  cache.pages = c.num_pages;
  cache.page_size = c.page_size;
  cache.table_width = c.table_width;
  const bool has_tables = !c.block_tables.empty();
  const Pages pages = make_pages(cache, has_tables ? c.block_tables.data() : nullptr);
  const int rows = box_rows(has_tables, c.page_size, c.tile_keys);
  CHECK(rows >= kLeastBoxRows && c.tile_keys % rows == 0 &&
        (!has_tables || c.page_size % rows == 0));
  for (int i = 0; i < 50 && e.batch > 0; ++i) {
    const int b = random(0, e.batch - 1);
    const CachedSequence s = make_sequence({c.index(), b}, e, 0, e.tokens);
    const Range seen = e.seen_keys(s, 0, e.tokens - 1).any;
    const int key = random(0, e.capacity / rows + 2) * rows;
    const Slot slot = pages.find(b, key, rows, seen);
    CHECK(slot.page >= 0 && slot.page <= pages.outside && slot.slot >= 0);
    const bool is_seen = key + rows > seen.begin && key < seen.end;
    if (!is_seen) {
      CHECK(slot.page == pages.outside);
      continue;
    }
    CHECK(slot.slot < c.page_size && slot.slot % (has_tables ? rows : 1) == 0);
    const int entry = has_tables ? c.block_tables[b * c.table_width + key / c.page_size] : b;
    const bool is_there = entry >= 0 && entry < c.num_pages;
    CHECK(slot.page == (is_there ? entry : pages.outside));
    CHECK(slot.slot == key % c.page_size);
  }
}

// Quotients by what a launch knows are those of the division.
void check_divisor() {
  const auto check = [](int by) {
    const Divisor divisor(by);
    CHECK(divisor == by);
    for (const int quotient : {0, 1, 2, INT_MAX / by - 1, INT_MAX / by, random(0, INT_MAX / by)}) {
      for (int rest = -1; rest <= 1; ++rest) {
        const std::int64_t n = std::int64_t{quotient} * by + rest;
        if (n < 0 || n > INT_MAX) continue;
        const int value = static_cast<int>(n);
        CHECK(value / divisor == value / by && value % divisor == value % by);
      }
    }
    CHECK(INT_MAX / divisor == INT_MAX / by);
  };
  for (int by = 1; by <= 5000; ++by) check(by);
  for (int bits = 13; bits <= 30; ++bits) {
    for (int off = -1; off <= 1; ++off) check((1 << bits) + off);
  }
  for (int i = 0; i < 20000; ++i) check(random(1, INT_MAX));
  check(INT_MAX);
}

// The longest and the largest extents that plans let through.
void check_limits() {
  CachedExtents e{1 << 28, kMaxSeqlen, 1, 4, kMaxSeqlen, kUnbounded, kUnbounded, 16};
  const CachedSequence s{0, kMaxSeqlen, kMaxSeqlen, kMaxSeqlen, 0, kMaxSeqlen};
  const SeenKeys seen = e.seen_keys(s, 0, kMaxSeqlen - 1);
  CHECK(seen.any.begin == 0 && seen.any.end == kMaxSeqlen);
  const std::int64_t total = std::int64_t{1} << 52;
  const Shares<std::int64_t> shares(total, 1000);
  const Parts parts = shares.parts({total - (1 << 22) - 1, 1 << 22, {1, 1 << 22}});
  CHECK(parts.count == 1 && shares.begin(1000) == total);
  const Shares<std::int64_t> one(std::int64_t{1 << 22} + 1, 132);
  const Parts all = one.parts({0, 1 << 22, {0, 1 << 15}});
  CHECK(all.count == 132 && all.first_group == 0);
}

// Equal work for all: the largest share beside the mean, in key tiles.
void check_balance() {
  for (const int batch : {1, 8, 64}) {
    const std::int64_t tiles = 512, total = batch * (tiles + 1);
    const Shares<std::int64_t> shares(total, 16);
    std::int64_t most = 0;
    for (int g = 0; g < 16; ++g) {
      std::int64_t load = 0;
      for (int b = 0; b < batch; ++b) {
        load += shares.tiles(b * (tiles + 1), tiles, shares.begin(g), shares.begin(g + 1)).size();
      }
      most = std::max(most, load);
    }
    CHECK(most <= batch * tiles / 16 + 3);
  }
}

}  // namespace

int main() {
  for (int i = 0; i < 3000; ++i) {
    const Call call = random_call();
    check_call<std::int64_t>(call);
    if (most_units(call.extents, call.rounds, call.tile_keys, call.beside) < 1 << 30)
      check_call<int>(call);
    check_pages(call);
  }
  check_divisor();
  check_limits();
  check_balance();
  return jax_fa3::test::finish();
}
