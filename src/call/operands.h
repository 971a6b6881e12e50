// Every array of a call, one row each: its public name, dimensions, element type, and whether a
// call may be without it. jax_fa3/operands.py has the same rows for what a user passes and gets
// (tests/test_operands_contract.py compares them); buffers are decoded by them (ffi/decode.h).
// Below the rows stand the optional arrays of every attention call, and how its problem takes them.
//
// Dimensions are letters:
//   b  batch            h  query heads          d  head_dim             m  blocks of query rows
//   s  query rows       k  key/value heads      e  head_dim of value    n  blocks of key rows
//   t  key rows         p  keys of a prepared value, whole blocks       w  bytes of a workspace
//   v  words of a plane of row intervals, of x sequences and y heads    c  ends of documents
//   r  keys of a bias, whole packets, of f sequences, g heads and q rows
//   u  words of a plane of a dense mask, of i sequences and j heads
//   a  sequences of sinks                  l  sequences of slopes
// and those of caches:
//   P  pages            S  slots of a page      T  query rows of all sequences
//   M  pages of a table's row                   R  starts of sequences' query rows, one more than b
//   L  rows of a slot, of keys and of values    C  counters
//   X  positions of a rotary table              Y  pairs of columns that it turns
// or the extent itself. m and n are of kDescaleBlock rows, where not one of a head's. Below the
// rows stands which dimensions broadcast.
#pragma once

#include <string_view>

#include "call/arrays.h"
#include "call/problem.h"

namespace jax_fa3 {
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
constexpr Operand kCaptured0{"captured_0", nullptr, Element::kAny, /*optional=*/true};
constexpr Operand kCaptured1{"captured_1", nullptr, Element::kAny, /*optional=*/true};
constexpr Operand kCaptured2{"captured_2", nullptr, Element::kAny, /*optional=*/true};
constexpr Operand kCaptured3{"captured_3", nullptr, Element::kAny, /*optional=*/true};
constexpr Operand kCaptured4{"captured_4", nullptr, Element::kAny, /*optional=*/true};
constexpr Operand kCaptured5{"captured_5", nullptr, Element::kAny, /*optional=*/true};
constexpr Operand kCaptured6{"captured_6", nullptr, Element::kAny, /*optional=*/true};
constexpr Operand kCaptured7{"captured_7", nullptr, Element::kAny, /*optional=*/true};

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

// Dimensions whose extent is 1 or that of the letter `all`.
struct OneOrAll {
  char letter;
  char all;
  const char* what;
};
constexpr OneOrAll kOneOrAll[] = {{'x', 'b', "sequences"},
                                  {'y', 'h', "heads"},
                                  {'g', 'h', "heads"},
                                  {'j', 'h', "heads"},
                                  {'q', 's', "rows"}};

// Dimensions whose extent divides b: each entry serves as many sequences in a row.
constexpr std::string_view kDivisorsOfBatch = "afil";

}  // namespace operands

// An index array: the lengths of work tiles then depend on values that no plan knows.
template <class Problem, auto kMember>
Array<Problem> index_array(const Operand& operand) {
  return {&operand, [](Problem& problem, void* address, Dims) {
            problem.index.*kMember = static_cast<const std::int32_t*>(address);
            problem.presence.any = true;
          }};
}

// The optional operands of every attention call, behind its own ones, in the order of Operands in
// jax_fa3/operands.py.
template <class Problem>
Arrays<Problem> index_arrays() {
  using Index = IndexArrays;
  constexpr std::uintptr_t kVisibilityAlignment = 16;  // bytes: it is read in fours of words
  return {
      index_array<Problem, &Index::query_lengths>(operands::kQueryLengths),
      index_array<Problem, &Index::key_lengths>(operands::kKeyLengths),
      index_array<Problem, &Index::query_offset>(operands::kQueryOffset),
      {&operands::kVisibility,
       [](Problem& problem, void* address, Dims dims) {
         const std::int64_t sequences = dims[0], heads = dims[1], words = dims[2];
         problem.index.visibility = static_cast<const std::int32_t*>(address);
         problem.index.visibility_batch_stride = sequences > 1 ? heads * words : 0;
         problem.index.visibility_head_stride = heads > 1 ? words : 0;
         problem.presence.any = problem.presence.visibility = true;
       },
       kVisibilityAlignment},
  };
}

// The optional operands of a call in 16 bits, behind the index arrays.
template <class Problem>
Arrays<Problem> score_arrays() {
  return {
      {&operands::kBias,
       [](Problem& problem, void* address, Dims dims) {
         problem.dense.bias = address;
         problem.dense.bias_shape = {dims[0], dims[1], dims[2]};
         problem.presence.variant = Variant::kBias;
       }},
      {&operands::kDenseMask,
       [](Problem& problem, void* address, Dims dims) {
         problem.dense.mask = static_cast<const std::int32_t*>(address);
         problem.dense.mask_shape.sequences = dims[0];
         problem.dense.mask_shape.heads = dims[1];
         problem.presence.any = true;
         Variant& variant = problem.presence.variant;
         if (variant != Variant::kBias) variant = Variant::kMask;  // those for a bias take both
       }},
      {&operands::kSinks,
       [](Problem& problem, void* address, Dims dims) {
         problem.sinks = {static_cast<const float*>(address), dims[0]};
       }},
      {&operands::kAlibiSlopes,
       [](Problem& problem, void* address, Dims dims) {
         problem.alibi_slopes = {static_cast<const float*>(address), dims[0]};
         problem.presence.variant = Variant::kAlibi;
       }},
  };
}

// The operands of a call in 16 bits.
template <class Problem>
Arrays<Problem> all_arrays(const Arrays<Problem>& own) {
  return joined<Problem>({own, index_arrays<Problem>(), score_arrays<Problem>()});
}

template <class Problem, int kNumber>
Array<Problem> captured_array(const Operand& operand) {
  return {&operand, [](Problem& problem, void* address, Dims) {
            problem.function.captured.array[kNumber] = address;
          }};
}

// What a call with score or mask functions has behind all others.
template <class Problem>
Arrays<Problem> function_arrays() {
  return {
      {&operands::kBatchNumber,
       [](Problem& problem, void* address, Dims) {
         problem.function.batch_numbers = static_cast<const std::int32_t*>(address);
         problem.presence.variant = Variant::kFunction;
       }},
      pointer_to<Problem, &Problem::function, &FunctionArrays::head_numbers>(operands::kHeadNumber),
      {&operands::kBlockStates,
       [](Problem& problem, void* address, Dims dims) {
         problem.function.blocks = static_cast<const std::int32_t*>(address);
         problem.function.blocks_shape.sequences = dims[0];
         problem.function.blocks_shape.heads = dims[1];
         problem.presence.any = true;
         problem.presence.variant = Variant::kBlocks;
       }},
      captured_array<Problem, 0>(operands::kCaptured0),
      captured_array<Problem, 1>(operands::kCaptured1),
      captured_array<Problem, 2>(operands::kCaptured2),
      captured_array<Problem, 3>(operands::kCaptured3),
      captured_array<Problem, 4>(operands::kCaptured4),
      captured_array<Problem, 5>(operands::kCaptured5),
      captured_array<Problem, 6>(operands::kCaptured6),
      captured_array<Problem, 7>(operands::kCaptured7),
  };
}

}  // namespace jax_fa3
