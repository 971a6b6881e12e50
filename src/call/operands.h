// Every array of a call, one row each: its public name, dimensions, element type, and whether a
// call may be without it. jax_fa3/operands.py has the same rows for what a user passes and gets
// (tests/test_options_contract.py compares them); buffers are decoded by them (ffi/decode.h).
//
// Dimensions are letters:
//   b  batch            h  query heads          d  head_dim             m  blocks of query rows
//   s  query rows       k  key/value heads      e  head_dim of value    n  blocks of key rows
//   t  key rows         p  keys of a prepared value, whole blocks       w  bytes of a workspace
//   v  words of a plane of row intervals, of x sequences and y heads    c  ends of documents
//   r  keys of a bias, whole packets, of f sequences, g heads and q rows
//   u  words of a plane of a dense mask, of i sequences and j heads
//   a  sequences of sinks                  l  sequences of slopes
//   G  groups of rows and W words of the classes of a dense mask alone, of i sequences and j heads
// and those of caches:
//   P  pages            S  slots of a page      T  query rows of all sequences
//   M  pages of a table's row                   R  starts of sequences' query rows, one more than b
//   L  rows of a slot, of keys and of values    C  counters
//   X  positions of a rotary table              Y  pairs of columns that it turns
// or the extent itself. m and n are of kDescaleBlock rows, where not one of a head's; a, f, i and l
// divide b; x is b, g, j and y are h, and q is s, or 1.
#pragma once

namespace jax_fa3 {

enum class Element {
  kInput,   // that of query
  kOutput,  // that of out
  kFloat32,
  kInt32,
  kByte,
  kBool,
  kAny,
};

struct Operand {
  const char* name;
  const char* dims;  // null: any
  Element element;
  bool optional = false;
};

namespace operands {

constexpr Operand kQuery{"query", "bshd", Element::kInput};
constexpr Operand kKey{"key", "btkd", Element::kInput};
constexpr Operand kValue{"value", "btke", Element::kInput};
constexpr Operand kPreparedValue{"prepared_value", "bkep", Element::kInput};
constexpr Operand kQueryDescale{"query_descale", "bhm", Element::kFloat32};
constexpr Operand kKeyDescale{"key_descale", "bkn", Element::kFloat32};
constexpr Operand kValueDescale{"value_descale", "bk", Element::kFloat32};
constexpr Operand kQueryLengths{"query_seq_lengths", "b", Element::kInt32, /*optional=*/true};
constexpr Operand kKeyLengths{"key_value_seq_lengths", "b", Element::kInt32, /*optional=*/true};
constexpr Operand kQueryOffset{"query_offset", "b", Element::kInt32, /*optional=*/true};
constexpr Operand kVisibility{"visibility", "xyv", Element::kInt32, /*optional=*/true};
constexpr Operand kBias{"bias", "fgqr", Element::kInput, /*optional=*/true};
constexpr Operand kDenseMask{"dense_mask", "iju", Element::kInt32, /*optional=*/true};
constexpr Operand kSinks{"sinks", "ah", Element::kFloat32, /*optional=*/true};
constexpr Operand kAlibiSlopes{"alibi_slopes", "lh", Element::kFloat32, /*optional=*/true};

constexpr Operand kBatchNumber{"batch_number", "b", Element::kInt32};
constexpr Operand kHeadNumber{"head_number", "h", Element::kInt32};
constexpr Operand kBlockStates{"block_states", "ijGW", Element::kInt32, /*optional=*/true};
constexpr Operand kCaptured{"captured", nullptr, Element::kAny};

constexpr Operand kQueryIds{"query_segment_ids", "bs", Element::kInt32, /*optional=*/true};
constexpr Operand kKeyIds{"key_value_segment_ids", "bt", Element::kInt32, /*optional=*/true};
constexpr Operand kKvStart{"kv_start", "bhs", Element::kInt32, /*optional=*/true};
constexpr Operand kKvEnd{"kv_end", "bhs", Element::kInt32, /*optional=*/true};
constexpr Operand kQueryEnds{"cu_seqlens_q", "bc", Element::kInt32, /*optional=*/true};
constexpr Operand kKeyEnds{"cu_seqlens_k", "bc", Element::kInt32, /*optional=*/true};
constexpr Operand kVisibilityOut{"visibility", "bhv", Element::kInt32};

constexpr Operand kMask{"mask", "bhst", Element::kBool};
constexpr Operand kMaskTable{"mask_table", "bhu", Element::kInt32};

constexpr Operand kOut{"out", "bshe", Element::kOutput};
constexpr Operand kLse{"lse", "bhs", Element::kFloat32};
constexpr Operand kMaxLogits{"max_logits", "bhs", Element::kFloat32, /*optional=*/true};
constexpr Operand kDOut{"dout", "bshe", Element::kOutput};
constexpr Operand kDLse{"dlse", "bhs", Element::kFloat32, /*optional=*/true};

constexpr Operand kDQuery{"dquery", "bshd", Element::kInput};
constexpr Operand kDKey{"dkey", "btkd", Element::kInput};
constexpr Operand kDValue{"dvalue", "btke", Element::kInput};
constexpr Operand kDBias{"dbias", "fgqr", Element::kInput, /*optional=*/true};
constexpr Operand kDSinks{"dsinks", "bhs", Element::kFloat32, /*optional=*/true};

constexpr Operand kQueryOut{"query_out", "bshd", Element::kOutput};
constexpr Operand kKeyOut{"key_out", "btkd", Element::kOutput};
constexpr Operand kValueOut{"value_out", "btke", Element::kOutput};
constexpr Operand kPreparedValueOut{"value_out", "bkep", Element::kOutput};

constexpr Operand kKeyCachePskh{"key_cache", "PSkd", Element::kInput};
constexpr Operand kKeyCacheKpsh{"key_cache", "kPSd", Element::kInput};
constexpr Operand kKeyCachePksh{"key_cache", "PkSd", Element::kInput};
constexpr Operand kKeyCacheSkph{"key_cache", "SkPd", Element::kInput};
constexpr Operand kKeyCacheFused{"key_cache", "PSLd", Element::kInput};
constexpr Operand kValueCachePskh{"value_cache", "PSke", Element::kInput};
constexpr Operand kValueCacheKpsh{"value_cache", "kPSe", Element::kInput};
constexpr Operand kValueCachePksh{"value_cache", "PkSe", Element::kInput};
constexpr Operand kValueCacheSkph{"value_cache", "SkPe", Element::kInput};
constexpr Operand kCachedQuery{"query", "Thd", Element::kInput};
constexpr Operand kCacheKeyLengths{"key_lengths", "b", Element::kInt32};
constexpr Operand kCacheQueryOffset{"query_offset", "b", Element::kInt32};
constexpr Operand kBlockTables{"block_tables", "bM", Element::kInt32, /*optional=*/true};
constexpr Operand kQueryStarts{"query_starts", "R", Element::kInt32, /*optional=*/true};
constexpr Operand kRowLengths{"query_lengths", "b", Element::kInt32, /*optional=*/true};
constexpr Operand kKeyStarts{"key_starts", "b", Element::kInt32, /*optional=*/true};
constexpr Operand kCachedOut{"out", "The", Element::kOutput};
constexpr Operand kCachedLse{"lse", "Th", Element::kFloat32};
constexpr Operand kCounters{"counters", "C", Element::kInt32};

constexpr Operand kNewKey{"key", "bskd", Element::kInput};
constexpr Operand kNewValue{"value", "bske", Element::kInput};
constexpr Operand kNewQuery{"query", "bshd", Element::kInput, /*optional=*/true};
constexpr Operand kNewQueryOut{"query_out", "bshd", Element::kInput, /*optional=*/true};
constexpr Operand kCacheLengths{"cache_lengths", "b", Element::kInt32};
constexpr Operand kNewLengths{"new_lengths", "b", Element::kInt32, /*optional=*/true};
constexpr Operand kCos{"cos", "XY", Element::kFloat32, /*optional=*/true};
constexpr Operand kSin{"sin", "XY", Element::kFloat32, /*optional=*/true};

constexpr Operand kTileCounter{"tile_counter", "1", Element::kInt32};
constexpr Operand kWorkspace{"workspace", "w", Element::kByte};

}  // namespace operands
}  // namespace jax_fa3
