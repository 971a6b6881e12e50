// The custom call that makes a table of row intervals.
#pragma once

#include "ffi/handler.h"
#include "kernels/visibility/visibility.h"

namespace jax_fa3 {

struct VisibilityAttributes {
  Names operands;
  Names results;
  std::int32_t seqlen_q;
  std::int32_t seqlen_k;
  std::int32_t query_offset;     // used without the offset array
  std::int32_t attention_chunk;  // keys; 0: none
  std::int32_t window_left;      // of documents, as in Options
  std::int32_t window_right;
};

struct VisibilityCall : ArrayTable<VisibilityProblem> {
  static constexpr const char* kTarget = "jax_fa3_visibility";
  using Attributes = VisibilityAttributes;

  static Status check(const Attributes& a) {
    if (a.operands.has(operands::kKeyIds) && !a.operands.has(operands::kQueryIds)) {
      return invalid_argument("operands must have query_segment_ids with key_value_segment_ids");
    }
    if (a.operands.has(operands::kQueryEnds) == a.operands.has(operands::kKeyEnds)) return {};
    return invalid_argument("operands must have both of cu_seqlens_q and cu_seqlens_k, or none");
  }
  static Types types(const Attributes& a) {
    Types types;
    types.seqlen_q = a.seqlen_q;
    types.seqlen_k = a.seqlen_k;
    return types;
  }

  static Arrays<Problem> operands(const Attributes&) {
    return {
        array<&Problem::query_ids>(operands::kQueryIds),
        array<&Problem::key_ids>(operands::kKeyIds),
        array<&Problem::kv_start>(operands::kKvStart),
        array<&Problem::kv_end>(operands::kKvEnd),
        array<&Problem::query_ends>(operands::kQueryEnds),
        array<&Problem::key_ends>(operands::kKeyEnds),
        array<&Problem::query_offset>(operands::kQueryOffset),
    };
  }
  static Arrays<Problem> results(const Attributes&) {
    return {
        array<&Problem::visibility>(operands::kVisibilityOut, alignof(Plane)),
        workspace(alignof(ChunkSummary)),
    };
  }
  static void fill(const Attributes& a, const Extents& extents, Problem& problem) {
    problem.num_ends = extents['c'];
    problem.window = {a.window_left, a.window_right, a.query_offset};
    problem.chunk = a.attention_chunk;
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
                                      xla::ffi::StructMember<jax_fa3::Names>("operands"),
                                      xla::ffi::StructMember<jax_fa3::Names>("results"),
                                      xla::ffi::StructMember<std::int32_t>("seqlen_q"),
                                      xla::ffi::StructMember<std::int32_t>("seqlen_k"),
                                      xla::ffi::StructMember<std::int32_t>("query_offset"),
                                      xla::ffi::StructMember<std::int32_t>("attention_chunk"),
                                      xla::ffi::StructMember<std::int32_t>("window_left"),
                                      xla::ffi::StructMember<std::int32_t>("window_right"));
