// The custom call that makes a table of row intervals.
#pragma once

#include "ffi/handler.h"
#include "kernels/visibility/visibility.h"

namespace jax_fa3 {

struct VisibilityAttributes {
  std::int32_t seqlen_q;
  std::int32_t seqlen_k;
  std::int32_t query_offset;     // used without the offset array
  std::int32_t attention_chunk;  // keys; 0: none
  std::int32_t window_left;      // of documents, as in Options
  std::int32_t window_right;
  bool has_query_segment_ids;
  bool has_key_value_segment_ids;
  bool has_kv_start;
  bool has_kv_end;
  bool has_cu_seqlens;
  bool has_query_offset;
};

struct VisibilityCall : ArrayTable<VisibilityProblem> {
  static constexpr const char* kTarget = "jax_fa3_visibility";
  using Attributes = VisibilityAttributes;

  static Status check(const Attributes& a) {
    if (!a.has_key_value_segment_ids || a.has_query_segment_ids) return {};
    return invalid_argument("has_query_segment_ids must be true with key_value_segment_ids");
  }
  static Types types(const Attributes& a) {
    Types types;
    types.seqlen_q = a.seqlen_q;
    types.seqlen_k = a.seqlen_k;
    return types;
  }

  static Arrays<Problem> operands(const Attributes& a) {
    return {
        array<&Problem::query_ids>(operands::kQueryIds, a.has_query_segment_ids),
        array<&Problem::key_ids>(operands::kKeyIds, a.has_key_value_segment_ids),
        array<&Problem::kv_start>(operands::kKvStart, a.has_kv_start),
        array<&Problem::kv_end>(operands::kKvEnd, a.has_kv_end),
        array<&Problem::query_ends>(operands::kQueryEnds, a.has_cu_seqlens),
        array<&Problem::key_ends>(operands::kKeyEnds, a.has_cu_seqlens),
        array<&Problem::query_offset>(operands::kQueryOffset, a.has_query_offset),
    };
  }
  static Arrays<Problem> results(const Attributes&) {
    return {
        array<&Problem::visibility>(operands::kVisibilityOut, true, kVisibilityAlignment),
        workspace<&Problem::workspace>(alignof(ChunkSummary)),
    };
  }
  static void fill(const Attributes& a, const Extents& extents, Problem& problem) {
    problem.num_ends = extents['c'];
    problem.window = {a.window_left, a.window_right, a.query_offset};
    problem.chunk = a.attention_chunk;
    problem.workspace_bytes = extents['w'];
  }

  static Status validate(const Problem& problem) {
    JFA_CHECK_OK(check_visibility(problem));
    return check_workspace(visibility_workspace_bytes(problem.shape), problem.workspace_bytes);
  }

  // There is nothing to choose.
  struct Plan {};
  static int sm_margin(const Attributes&) { return 0; }
  static StatusOr<Plan> plan(const Problem&, int) { return Plan{}; }
  static Status launch(const Plan&, const Problem& problem, CUstream_st* stream) {
    return launch_visibility(problem, stream);
  }
};

}  // namespace jax_fa3

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::VisibilityAttributes,
                                      xla::ffi::StructMember<std::int32_t>("seqlen_q"),
                                      xla::ffi::StructMember<std::int32_t>("seqlen_k"),
                                      xla::ffi::StructMember<std::int32_t>("query_offset"),
                                      xla::ffi::StructMember<std::int32_t>("attention_chunk"),
                                      xla::ffi::StructMember<std::int32_t>("window_left"),
                                      xla::ffi::StructMember<std::int32_t>("window_right"),
                                      xla::ffi::StructMember<bool>("has_query_segment_ids"),
                                      xla::ffi::StructMember<bool>("has_key_value_segment_ids"),
                                      xla::ffi::StructMember<bool>("has_kv_start"),
                                      xla::ffi::StructMember<bool>("has_kv_end"),
                                      xla::ffi::StructMember<bool>("has_cu_seqlens"),
                                      xla::ffi::StructMember<bool>("has_query_offset"));
