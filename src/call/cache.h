// Caches of keys and values: pages of slots, each slot a token's key or value of every kv head.
//
// A cache without a table of pages has one page for each sequence.
#pragma once

#include <optional>
#include <string_view>

#include "call/problem.h"

namespace jax_fa3 {

// The order of a cache's dimensions: p pages, s slots, k kv heads, h head_dim.
enum class CacheLayout : std::int32_t { kPskh = 0, kKpsh = 1, kPksh = 2, kSkph = 3 };

constexpr const char* to_string(CacheLayout layout) {
  return layout == CacheLayout::kPskh   ? "pskh"
         : layout == CacheLayout::kKpsh ? "kpsh"
         : layout == CacheLayout::kPksh ? "pksh"
                                        : "skph";
}

constexpr std::optional<CacheLayout> parse_cache_layout(std::string_view letters) {
  for (const CacheLayout layout :
       {CacheLayout::kPskh, CacheLayout::kKpsh, CacheLayout::kPksh, CacheLayout::kSkph}) {
    if (letters == to_string(layout)) return layout;
  }
  return std::nullopt;
}

// Elements from one page, slot or kv head to the next.
struct CacheStrides {
  std::int64_t page;
  std::int64_t slot;
  std::int64_t head;
};

// Of a dense array of `rows` rows of `head_dim` elements a slot: kv heads, or, where keys and
// values lie side by side in one array, twice as many.
constexpr CacheStrides dense_strides(CacheLayout layout, std::int64_t pages, std::int64_t slots,
                                     std::int64_t rows, std::int64_t head_dim) {
  switch (layout) {
    case CacheLayout::kPskh:
      return {slots * rows * head_dim, rows * head_dim, head_dim};
    case CacheLayout::kKpsh:
      return {slots * head_dim, head_dim, pages * slots * head_dim};
    case CacheLayout::kPksh:
      return {rows * slots * head_dim, head_dim, slots * head_dim};
    case CacheLayout::kSkph:
      return {head_dim, rows * pages * head_dim, pages * head_dim};
  }
  return {};
}

// What the caches of a call have in common.
struct CacheShape {
  CacheLayout layout = CacheLayout::kPskh;
  std::int64_t pages = 0;
  std::int64_t page_size = 0;    // slots
  std::int64_t table_width = 1;  // pages of a sequence
  bool is_fused = false;         // one array, with the kv heads' rows k0 v0 k1 v1 ...

  JFA_HD std::int64_t capacity() const { return page_size * table_width; }  // tokens of a sequence

  // Of the array with `head_dim` elements a row; kv heads are two rows apart where it is fused.
  CacheStrides strides(std::int64_t num_heads_kv, std::int64_t head_dim) const {
    CacheStrides strides =
        dense_strides(layout, pages, page_size, (is_fused ? 2 : 1) * num_heads_kv, head_dim);
    if (is_fused) strides.head *= 2;
    return strides;
  }
};

// Index arrays in device memory; a null pointer means absent. The kernels clamp what they read:
// lengths to [0, capacity], starts to [0, tokens], offsets to +/- kMaxSeqlen.
struct CachedIndex {
  const std::int32_t* key_lengths = nullptr;    // [b]
  const std::int32_t* query_offset = nullptr;   // [b], where a sequence's first row stands
  const std::int32_t* block_tables = nullptr;   // [b, table_width]
  const std::int32_t* query_starts = nullptr;   // [b + 1]
  const std::int32_t* query_lengths = nullptr;  // [b], rows from there on are padding
  const std::int32_t* key_starts = nullptr;     // [b], slots before it are not seen
};

// Attention over caches. Shape has query rows of a sequence in seqlen_q, or with query_starts those
// of all, and the capacity in seqlen_k.
struct ForwardCachedProblem {
  Shape shape;
  CacheShape cache;
  CachedIndex index;
  std::int32_t window_left = kUnbounded;   // columns, inclusive
  std::int32_t window_right = kUnbounded;  // columns, inclusive
  std::int64_t tokens = 0;                 // query rows of all sequences
  std::int64_t num_counters = 0;           // that `counters` has
  std::int64_t num_starts = -1;            // that query_starts has
  std::int64_t rows = -1;                  // of a slot of a fused cache
  bool is_ragged = false;                  // there are query_starts, where sequences' rows begin
  bool has_block_tables = false;
  float softmax_scale = 1.f;      // > 0
  float rescale_threshold = 8.f;  // as ForwardProblem has it
  bool out_float32 = false;

  const void* query = nullptr;        // [tokens, h_q, d]
  const void* key_cache = nullptr;    // d elements a row
  const void* value_cache = nullptr;  // d_v elements a row; null where the cache is fused
  void* out = nullptr;                // [tokens, h_q, d_v], shape's dtype or float32
  float* lse = nullptr;               // [tokens, h_q], natural log, -inf where nothing is seen
  void* workspace = nullptr;          // ForwardCachedPlan::workspace_bytes
  std::int64_t workspace_bytes = 0;   // that it has
  std::int32_t* counters = nullptr;   // workspace too
};

// New tokens into caches. Shape has the new tokens of a sequence in seqlen_q.
struct AppendProblem {
  Shape shape;
  CacheShape cache;
  const std::int32_t* cache_lengths = nullptr;  // [b], tokens before
  const std::int32_t* block_tables = nullptr;   // [b, table_width] or null
  const std::int32_t* new_lengths = nullptr;    // [b] or null: all of seqlen_q
  const float* cos = nullptr;                   // [positions, width / 2] or null: no rotary
  const float* sin = nullptr;                   // the same
  std::int64_t positions = 0;
  std::int64_t half_width = 0;
  std::int64_t rows = -1;  // of a slot of a fused cache
  bool has_block_tables = false;
  bool is_interleaved = false;  // pairs of neighbours, else of halves

  const void* key = nullptr;    // [b, t, h_kv, d]
  const void* value = nullptr;  // [b, t, h_kv, d_v]
  const void* query = nullptr;  // [b, t, h_q, d] or null
  const void* key_cache = nullptr;
  const void* value_cache = nullptr;
  void* key_cache_out = nullptr;  // the same memory as key_cache
  void* value_cache_out = nullptr;
  void* query_out = nullptr;
};

}  // namespace jax_fa3
