// Lists of work tiles: disjoint, of all keys, and no more than there is room for, whatever the
// documents are, with bounds that hold.
#include "attention/key_tiles.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "call/text.h"
#include "check.h"

namespace jax_fa3 {
namespace {

// What the keys of documents of these lengths are seen by, with a causal mask's rows.
struct Table {
  PlaneLayout layout;
  std::vector<Bounds> memory;  // aligned as a table is
  PlaneView<std::int32_t> plane;
  Intervals intervals;

  explicit Table(const std::vector<int>& documents)
      : layout{sum(documents), sum(documents)},
        memory(layout.words() / 4 + 1),
        plane{reinterpret_cast<std::int32_t*>(memory.data()), layout} {
    int begin = 0;
    for (const int length : documents) {
      for (int key = begin; key < begin + length; ++key) plane.keys()[key] = {key, begin + length};
      begin += length;
    }
    for (int first = 0; first < layout.seqlen_k; first += kBoundsRows) {
      Bounds all = Bounds::none();
      for (int key = first; key < std::min(first + kBoundsRows, layout.seqlen_k); ++key) {
        const Interval& rows = plane.keys()[key];
        all.add({rows.begin, rows.begin, rows.end, rows.end});
      }
      plane.key_bounds()[first / kBoundsRows] = all;
    }
    intervals.plane = &plane.summary();
    intervals.keys = plane.keys();
  }
  static int sum(const std::vector<int>& documents) {
    return std::accumulate(documents.begin(), documents.end(), 0);
  }
};

// The list of documents of these lengths, made by several threads, one after another.
std::vector<KeyTile> list_of(const Table& table, const std::vector<int>& documents, int block_n) {
  std::vector<KeyTile> tiles(KeyTileList::size(table.layout.seqlen_k, block_n),
                             KeyTile{-1, -1, -1, -1, {}});
  constexpr int kThreads = 3;
  std::vector<KeyTileList> lists;
  for (int thread = kThreads - 1; thread >= 0; --thread) {
    lists.emplace_back(tiles.data(), block_n, table.intervals, table.layout, thread, kThreads);
    KeyTileList& list = lists.back();
    int key = 0;
    bool ends = false;
    for (const int length : documents) {
      const bool begins = length >= kLongDocument;
      if (ends || begins) list.add_edge(key, ends, begins);
      ends = begins;
      key += length;
    }
    list.finish();
  }
  for (KeyTileList& list : lists) list.add_bounds();
  return tiles;
}

std::vector<int> random_documents(std::mt19937& random) {
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  std::vector<int> documents(1 + below(12));
  for (int& length : documents) length = 1 + below(below(2) ? 3000 : below(2) ? 300 : 40);
  return documents;
}

bool same(const Bounds& a, const Bounds& b) {
  return a.least_begin == b.least_begin && a.greatest_begin == b.greatest_begin &&
         a.least_end == b.least_end && a.greatest_end == b.greatest_end;
}

void tiles_of_random_documents() {
  std::mt19937 random(0);
  for (int i = 0; i < 2000; ++i) {
    const std::vector<int> documents = random_documents(random);
    const int block_n = i % 2 == 0 ? 64 : 128;
    const std::string what = concat("problem ", i);
    const Table table(documents);
    const auto list = list_of(table, documents, block_n);
    const int count = KeyTileList::num_tiles(list.data());
    CHECK_DETAIL(count <= KeyTileList::most_tiles(table.layout.seqlen_k, block_n), what);
    std::vector<int> edges{0};  // in front of each document, and behind the last
    for (const int length : documents) edges.push_back(edges.back() + length);

    int end = 0;
    for (int number = 0; number < count; ++number) {
      const KeyTile& tile = KeyTileList::tile(list.data(), number);
      CHECK_DETAIL(tile.begin == end, what);
      CHECK_DETAIL(tile.begin < tile.end && tile.end <= tile.begin + block_n, what);
      end = tile.end;
      // What is outside of the bounds sees no key, and what is inside sees all.
      CHECK_DETAIL(tile.is_bounded, what);
      Bounds exact = Bounds::none();
      for (int key = tile.begin; key < tile.end; ++key) {
        const Interval& rows = table.plane.keys()[key];
        exact.add({rows.begin, rows.begin, rows.end, rows.end});
      }
      const Bounds& seen = tile.seen_by;
      CHECK_DETAIL(seen.least_begin <= exact.least_begin, what);
      CHECK_DETAIL(seen.greatest_end >= exact.greatest_end, what);
      CHECK_DETAIL(seen.greatest_begin >= exact.greatest_begin, what);
      CHECK_DETAIL(seen.least_end <= exact.least_end, what);
    }
    CHECK_DETAIL(end == table.layout.seqlen_k, what);
    for (std::size_t number = count; 1 + number < list.size(); ++number) {
      const KeyTile& tile = KeyTileList::tile(list.data(), static_cast<int>(number));
      CHECK_DETAIL(tile.begin == end && tile.end == end, what);
    }

    // A long document begins with a tile; its own whole tiles have bounds of their own.
    for (std::size_t d = 0; d < documents.size(); ++d) {
      if (documents[d] < kLongDocument) continue;
      const int document_end = edges[d + 1];
      for (int key = edges[d]; key + block_n <= document_end; key += block_n) {
        const Bounds own{key, key + block_n - 1, document_end, document_end};
        CHECK_DETAIL(std::any_of(list.begin() + 1, list.end(),
                                 [&](const KeyTile& tile) {
                                   return tile.begin == key && tile.end == key + block_n &&
                                          same(tile.seen_by, own);
                                 }),
                     what);
      }
    }
  }
}

// Heads that differ have bounds of their own.
void planes_of_heads() {
  const std::vector<int> documents{1100, 1200};
  Table table(documents);
  table.intervals.plane_stride = table.layout.words();
  const auto list = list_of(table, documents, 128);
  CHECK(!KeyTileList::tile(list.data(), 0).is_bounded);
}

void edges() {
  const Interval nobody{0, 0};
  CHECK(is_edge({0, 4}, {4, 8}));
  CHECK(is_edge({0, 4}, {6, 8}));
  CHECK(!is_edge({0, 5}, {4, 8}));
  CHECK(is_edge({0, 5}, nobody));
  CHECK(is_edge(nobody, {0, 5}));
  CHECK(!is_edge(nobody, nobody));
}

}  // namespace
}  // namespace jax_fa3

int main() {
  jax_fa3::tiles_of_random_documents();
  jax_fa3::edges();
  jax_fa3::planes_of_heads();
  return jax_fa3::test::finish();
}
