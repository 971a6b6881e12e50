// Where the keys of a sequence are in a cache, and in what boxes the copy engine loads a tile of
// them: as many rows as tiles and pages have in common. Pure arithmetic for host and device.
#pragma once

#include <numeric>

#include "attention/cached.h"

namespace jax_fa3 {

constexpr int kLeastBoxRows = 8;  // of a swizzle's pattern

// Rows of a box of a tile of `tile_keys` keys: a power of two from 8 on. Without a table a sequence
// is one page, which tiles begin with.
constexpr int box_rows(bool has_block_tables, std::int64_t page_size, int tile_keys) {
  return has_block_tables ? static_cast<int>(std::gcd<std::int64_t>(page_size, tile_keys))
                          : tile_keys;
}

struct Slot {
  int page;
  int slot;
};

struct Pages {
  const std::int32_t* block_tables;  // [b, table_width], or null: page b is sequence b's
  int table_width;
  Divisor page_size;  // slots
  int num_pages;      // of the cache
  int outside;        // a page that is not there: what is loaded from it is zero

  // Of the box of `rows` keys from `key` on. What no row sees is not looked up, nor loaded.
  JFA_HD Slot find(int batch, int key, int rows, const Range& seen) const {
    if (key + rows <= seen.begin || key >= seen.end) return {outside, 0};
    const int number = key / page_size;  // within the table: seen.end is within the capacity
    int page = batch;
    if (block_tables != nullptr) {
      page = block_tables[static_cast<std::int64_t>(batch) * table_width + number];
      if (page < 0 || page >= num_pages) page = outside;
    }
    return {page, key - number * page_size};
  }
};

inline Pages make_pages(const CacheShape& cache, const std::int32_t* block_tables) {
  const int pages = static_cast<int>(cache.pages);
  return {block_tables, static_cast<int>(cache.table_width), static_cast<int>(cache.page_size),
          pages, max_of(pages, 1)};
}

}  // namespace jax_fa3
