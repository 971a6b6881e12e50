// Lists of work tiles: disjoint, of all keys, and no more than there is room for, whatever the
// documents are; a tile that is inside of a document has no edge.
#include "attention/key_tiles.h"

#include <algorithm>
#include <random>
#include <vector>

#include "call/text.h"
#include "check.h"

namespace jax_fa3 {
namespace {

constexpr std::int32_t kUnwritten = -12345;

// The words of the list of documents of these lengths, made by several threads, one after another.
std::vector<std::int32_t> list_of(const std::vector<int>& documents, int block_n) {
  int seqlen_k = 0;
  for (const int length : documents) seqlen_k += length;
  std::vector<std::int32_t> words(KeyTileList::most_words(seqlen_k, block_n), kUnwritten);
  constexpr int kThreads = 3;
  for (int thread = kThreads - 1; thread >= 0; --thread) {
    KeyTileList list(block_n, words.data());
    int key = 0;
    bool ends = false;
    for (const int length : documents) {
      const bool begins = length >= kLongDocument;
      if (ends || begins) list.add_edge(key, ends, begins, thread, kThreads);
      ends = begins;
      key += length;
    }
    list.finish(seqlen_k, thread, kThreads);
  }
  return words;
}

std::vector<KeyTile> tiles_of(const std::vector<std::int32_t>& words, int block_n) {
  std::vector<KeyTile> tiles;
  for (KeyTile tile; tile.find(words.data(), static_cast<int>(tiles.size()), block_n);) {
    tiles.push_back(tile);
  }
  return tiles;
}

std::vector<int> random_documents(std::mt19937& random) {
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  std::vector<int> documents(1 + below(12));
  for (int& length : documents) length = 1 + below(below(2) ? 1000 : below(2) ? 300 : 40);
  return documents;
}

void tiles_of_random_documents() {
  std::mt19937 random(0);
  for (int i = 0; i < 2000; ++i) {
    const std::vector<int> documents = random_documents(random);
    const int block_n = i % 2 == 0 ? 64 : 128;
    std::vector<int> edges;  // in front of each document, and behind the last
    int seqlen_k = 0;
    for (const int length : documents) {
      edges.push_back(seqlen_k);
      seqlen_k += length;
    }
    edges.push_back(seqlen_k);

    const auto words = list_of(documents, block_n);
    const auto tiles = tiles_of(words, block_n);
    const std::string what = concat("problem ", i);
    CHECK_DETAIL(static_cast<std::int64_t>(tiles.size()) <=
                     KeyTileList::most_tiles(seqlen_k, block_n),
                 what);
    int end = 0;
    for (const KeyTile& tile : tiles) {
      CHECK_DETAIL(tile.begin == end, what);
      CHECK_DETAIL(tile.begin < tile.end && tile.end <= tile.begin + block_n, what);
      end = tile.end;
      const auto cuts = [&](int edge) { return tile.begin < edge && edge < tile.end; };
      if (tile.is_inside) CHECK_DETAIL(std::none_of(edges.begin(), edges.end(), cuts), what);
    }
    CHECK_DETAIL(end == seqlen_k, what);

    // A long document begins with a tile, and all of its own tiles but the last are whole.
    for (std::size_t d = 0; d < documents.size(); ++d) {
      if (documents[d] < kLongDocument) continue;
      for (int key = edges[d]; key + block_n <= edges[d + 1]; key += block_n) {
        CHECK_DETAIL(std::any_of(tiles.begin(), tiles.end(),
                                 [&](const KeyTile& tile) {
                                   return tile.begin == key && tile.end == key + block_n &&
                                          tile.is_inside;
                                 }),
                     what);
      }
    }
  }
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

void without_a_list() {
  KeyTile tile;
  CHECK(tile.find(nullptr, 3, 128));
  CHECK(tile.begin == 384 && tile.end == 512 && !tile.is_inside);
}

// The bounds of a tile inside of a document are its own; of another those of groups of 64 keys.
void bounds_of_rows() {
  constexpr int kSeqlen = 640;
  const PlaneLayout layout{kSeqlen, kSeqlen};
  std::vector<std::int32_t> words(layout.words());
  const PlaneView<std::int32_t> plane{words.data(), layout};
  for (int key = 0; key < kSeqlen; ++key) {
    plane.keys()[key] = key < 300 ? Interval{key, 300} : Interval{key, kSeqlen};
  }
  for (int group = 0; group < kSeqlen / kBoundsRows; ++group) {
    Bounds all = Bounds::none();
    for (int i = 0; i < kBoundsRows; ++i) {
      const Interval& rows = plane.keys()[group * kBoundsRows + i];
      all.add({rows.begin, rows.begin, rows.end, rows.end});
    }
    plane.key_bounds()[group] = all;
  }
  Intervals intervals;
  intervals.plane = reinterpret_cast<const Plane*>(words.data());
  intervals.keys = plane.keys();
  KeyTile tile;
  const auto list = list_of({300, 340}, 128);
  CHECK(tile.find(list.data(), 3, 128));
  CHECK(tile.begin == 300 && tile.end == 428 && tile.is_inside);
  const Bounds own = tile.seen_by(intervals, layout, 1);
  CHECK(own.least_begin == 300 && own.greatest_begin == 427);
  CHECK(own.least_end == kSeqlen && own.greatest_end == kSeqlen);
  tile.is_inside = false;
  const Bounds of_groups = tile.seen_by(intervals, layout, 1);
  CHECK(of_groups.least_begin == 256 && of_groups.least_end == 300);
}

}  // namespace
}  // namespace jax_fa3

int main() {
  jax_fa3::tiles_of_random_documents();
  jax_fa3::edges();
  jax_fa3::without_a_list();
  jax_fa3::bounds_of_rows();
  return jax_fa3::test::finish();
}
