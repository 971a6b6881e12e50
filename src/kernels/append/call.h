// The custom call that appends tokens to caches.
#pragma once

#include "ffi/caches.h"
#include "ffi/handler.h"
#include "kernels/append/append.h"

namespace jax_fa3 {

struct AppendAttributes {
  Names operands;
  Names results;
  std::string_view layout;  // of the caches
  bool is_fused;            // keys and values in one array
  bool is_interleaved;      // rotary pairs are neighbours, else of the two halves
};

struct AppendCall : ArrayTable<AppendProblem> {
  static constexpr const char* kTarget = "jax_fa3_append";
  using Attributes = AppendAttributes;

  static Status check(const Attributes& a) {
    if (a.operands.has(operands::kCos) != a.operands.has(operands::kSin)) {
      return invalid_argument("operands must have both of cos and sin, or none");
    }
    if (a.operands.has(operands::kNewQuery) != a.results.has(operands::kNewQueryOut)) {
      return invalid_argument("query must be among operands and query_out among results, or none");
    }
    return check_layout(a.layout, a.is_fused);
  }
  static Types types(const Attributes&) { return {}; }

  static Arrays<Problem> operands(const Attributes& a) {
    const Arrays<Problem> others{
        array<&Problem::key>(operands::kNewKey),
        array<&Problem::value>(operands::kNewValue),
        array<&Problem::cache_lengths>(operands::kCacheLengths),
        array<&Problem::block_tables>(operands::kBlockTables),
        array<&Problem::new_lengths>(operands::kNewLengths),
        array<&Problem::cos>(operands::kCos),
        array<&Problem::sin>(operands::kSin),
        array<&Problem::query>(operands::kNewQuery),
    };
    return joined<Problem>({caches<&Problem::key_cache, &Problem::value_cache>(a), others});
  }
  static Arrays<Problem> results(const Attributes& a) {
    return joined<Problem>({caches<&Problem::key_cache_out, &Problem::value_cache_out>(a),
                            {array<&Problem::query_out>(operands::kNewQueryOut)}});
  }
  static void fill(const Attributes& a, const Extents& extents, Problem& problem) {
    problem.has_block_tables = a.operands.has(operands::kBlockTables);
    problem.cache = cache_shape(extents, a.layout, a.is_fused, problem.has_block_tables);
    problem.shape.seqlen_k = problem.cache.capacity();
    // Without a query there is nothing that head counts of one could differ from.
    if (!a.operands.has(operands::kNewQuery))
      problem.shape.num_heads_q = problem.shape.num_heads_kv;
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

 private:
  template <auto kKeyCache, auto kValueCache>
  static Arrays<Problem> caches(const Attributes& a) {
    return cache_arrays<Problem, kKeyCache, kValueCache>(a.layout, a.is_fused);
  }
};

}  // namespace jax_fa3

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::AppendAttributes,
                                      xla::ffi::StructMember<jax_fa3::Names>("operands"),
                                      xla::ffi::StructMember<jax_fa3::Names>("results"),
                                      xla::ffi::StructMember<std::string_view>("layout"),
                                      xla::ffi::StructMember<bool>("is_fused"),
                                      xla::ffi::StructMember<bool>("is_interleaved"));
