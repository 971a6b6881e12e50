// What the custom calls over caches have in common: the arrays of a cache, by its layout, and what
// their extents say.
#pragma once

#include "call/cache.h"
#include "call/operands.h"
#include "call/shape.h"
#include "call/text.h"
#include "ffi/decode.h"

namespace jax_fa3 {

inline Status check_layout(std::string_view layout, bool is_fused) {
  const auto parsed = parse_cache_layout(layout);
  if (!parsed.has_value()) {
    return invalid_argument(concat("layout must be pskh, kpsh, pksh or skph, got '", layout, "'"));
  }
  if (!is_fused || *parsed == CacheLayout::kPskh) return {};
  return invalid_argument(concat("layout must be pskh with is_fused, got '", layout, "'"));
}

inline const Operand& key_cache_operand(std::string_view layout) {
  static constexpr const Operand* kRows[] = {&operands::kKeyCachePskh, &operands::kKeyCacheKpsh,
                                             &operands::kKeyCachePksh, &operands::kKeyCacheSkph};
  return *kRows[static_cast<int>(*parse_cache_layout(layout))];
}
inline const Operand& value_cache_operand(std::string_view layout) {
  static constexpr const Operand* kRows[] = {&operands::kValueCachePskh, &operands::kValueCacheKpsh,
                                             &operands::kValueCachePksh,
                                             &operands::kValueCacheSkph};
  return *kRows[static_cast<int>(*parse_cache_layout(layout))];
}

// The caches themselves, of a checked layout: one array where they are fused.
template <class Problem, auto kKeyCache, auto kValueCache>
Arrays<Problem> cache_arrays(std::string_view layout, bool is_fused) {
  if (is_fused) return {pointer_to<Problem, kKeyCache>(operands::kKeyCacheFused)};
  return {pointer_to<Problem, kKeyCache>(key_cache_operand(layout)),
          pointer_to<Problem, kValueCache>(value_cache_operand(layout))};
}

inline CacheShape cache_shape(const Extents& extents, std::string_view layout, bool is_fused,
                              bool has_block_tables) {
  CacheShape cache;
  cache.layout = *parse_cache_layout(layout);
  cache.pages = extents['P'];
  cache.page_size = extents['S'];
  cache.table_width = has_block_tables ? extents['M'] : 1;
  cache.is_fused = is_fused;
  return cache;
}

// What the kernels need of a cache: 32-bit page and slot numbers, and a page for each sequence
// where no table says which.
inline Status check_cache(const CacheShape& cache, const Shape& shape, bool has_block_tables) {
  if (!has_block_tables && cache.pages != shape.batch) {
    return invalid_argument(concat("key_cache without block_tables must have ", shape.batch,
                                   " sequences, got ", cache.pages));
  }
  if (cache.pages > kMaxSeqlen) {
    return invalid_argument(
        concat("key_cache must have at most ", kMaxSeqlen, " pages, got ", cache.pages));
  }
  if (cache.is_fused && shape.head_dim != shape.head_dim_v) {
    return invalid_argument(concat("a fused cache must have head_dim_v = head_dim = ",
                                   shape.head_dim, ", got ", shape.head_dim_v));
  }
  const auto capacity = checked_product("capacity", {cache.page_size, cache.table_width});
  if (!capacity.ok()) return capacity.status();
  if (capacity.value() <= kMaxSeqlen) return {};
  return invalid_argument(concat("page_size * block_tables.shape[1] must be at most ", kMaxSeqlen,
                                 ", got ", cache.page_size, " * ", cache.table_width));
}

// Of a fused array with two rows for each kv head.
inline Status check_fused_rows(const CacheShape& cache, std::int64_t rows) {
  if (!cache.is_fused || rows % 2 == 0) return {};
  return invalid_argument(
      concat("a fused key_cache must have an even number of rows a slot, got ", rows));
}

}  // namespace jax_fa3
