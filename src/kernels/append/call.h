// The custom call that appends tokens to caches.
#pragma once

#include "ffi/caches.h"
#include "ffi/handler.h"
#include "kernels/append/append.h"

namespace jax_fa3 {

struct AppendAttributes {
  std::string_view layout;  // of the caches
  bool is_fused;            // keys and values in one array
  bool has_block_tables;
  bool has_new_lengths;
  bool has_rotary;
  bool is_interleaved;  // rotary pairs are neighbours, else of the two halves
  bool has_query;
};

struct AppendCall : ArrayTable<AppendProblem> {
  static constexpr const char* kTarget = "jax_fa3_append";
  using Attributes = AppendAttributes;

  static Status check(const Attributes& a) { return check_layout(a.layout, a.is_fused); }
  static Types types(const Attributes&) { return {}; }

  static Arrays<Problem> operands(const Attributes& a) {
    Arrays<Problem> arrays{
        array<&Problem::key_cache>(key_cache_operand(a.layout, a.is_fused)),
    };
    if (!a.is_fused) arrays.push_back(array<&Problem::value_cache>(value_cache_operand(a.layout)));
    arrays.push_back(array<&Problem::key>(operands::kNewKey));
    arrays.push_back(array<&Problem::value>(operands::kNewValue));
    arrays.push_back(array<&Problem::cache_lengths>(operands::kCacheLengths));
    arrays.push_back(array<&Problem::block_tables>(operands::kBlockTables, a.has_block_tables));
    arrays.push_back(array<&Problem::new_lengths>(operands::kNewLengths, a.has_new_lengths));
    arrays.push_back(array<&Problem::cos>(operands::kCos, a.has_rotary));
    arrays.push_back(array<&Problem::sin>(operands::kSin, a.has_rotary));
    arrays.push_back(array<&Problem::query>(operands::kNewQuery, a.has_query));
    return arrays;
  }
  static Arrays<Problem> results(const Attributes& a) {
    Arrays<Problem> arrays{
        array<&Problem::key_cache_out>(key_cache_operand(a.layout, a.is_fused)),
    };
    if (!a.is_fused) {
      arrays.push_back(array<&Problem::value_cache_out>(value_cache_operand(a.layout)));
    }
    arrays.push_back(array<&Problem::query_out>(operands::kNewQueryOut, a.has_query));
    return arrays;
  }
  static void fill(const Attributes& a, const Extents& extents, Problem& problem) {
    problem.cache = cache_shape(extents, a.layout, a.is_fused, a.has_block_tables);
    problem.has_block_tables = a.has_block_tables;
    problem.shape.seqlen_k = problem.cache.capacity();
    // Without a query there is nothing that head counts of one could differ from.
    if (!a.has_query) problem.shape.num_heads_q = problem.shape.num_heads_kv;
    problem.rows = extents['L'];
    problem.positions = extents['X'];
    problem.half_width = extents['Y'];
    problem.is_interleaved = a.is_interleaved;
  }

  static Status validate(const Problem& problem) {
    const Shape& s = problem.shape;
    JFA_CHECK_OK(check_cache(problem.cache, s, problem.has_block_tables));
    if (problem.cache.is_fused && problem.rows != 2 * s.num_heads_kv) {
      return invalid_argument(concat("a fused key_cache must have 2 * ", s.num_heads_kv,
                                     " rows a slot, got ", problem.rows));
    }
    return check_append(problem);
  }

  // There is nothing to choose.
  struct Plan {};
  static int sm_margin(const Attributes&) { return 0; }
  static StatusOr<Plan> plan(const Problem&, int) { return Plan{}; }
  static Status launch(const Plan&, const Problem& problem, CUstream_st* stream) {
    if (problem.key_cache_out != problem.key_cache ||
        problem.value_cache_out != problem.value_cache) {
      return invalid_argument("the results must be aliased to key_cache and value_cache");
    }
    return launch_append(problem, stream);
  }
};

}  // namespace jax_fa3

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_fa3::AppendAttributes, xla::ffi::StructMember<std::string_view>("layout"),
    xla::ffi::StructMember<bool>("is_fused"), xla::ffi::StructMember<bool>("has_block_tables"),
    xla::ffi::StructMember<bool>("has_new_lengths"), xla::ffi::StructMember<bool>("has_rotary"),
    xla::ffi::StructMember<bool>("is_interleaved"), xla::ffi::StructMember<bool>("has_query"));
