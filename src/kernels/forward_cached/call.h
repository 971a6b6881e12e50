// The custom call of attention over caches.
#pragma once

#include <cmath>

#include "call/text.h"
#include "ffi/caches.h"
#include "ffi/handler.h"
#include "ffi/plan_cache.h"
#include "kernels/forward_cached/family.h"

namespace jax_fa3 {

struct CachedOptions {
  float scale;                // of the logits, > 0
  std::int32_t window_left;   // columns, inclusive; kUnbounded when off
  std::int32_t window_right;  // columns, inclusive; kUnbounded when off
  float rescale_threshold;    // log2 units
  std::int32_t sm_margin;     // streaming multiprocessors to leave free
  bool is_fused;              // keys and values in one array
  bool out_float32;
};

struct ForwardCachedAttributes {
  Names operands;
  Names results;
  CachedOptions options;
  std::string_view layout;         // of the caches
  std::int32_t rows_per_sequence;  // 0 with query_starts
};

struct ForwardCachedCall : ArrayTable<ForwardCachedProblem> {
  static constexpr const char* kTarget = "jax_fa3_forward_cached";
  using Attributes = ForwardCachedAttributes;

  static Status check(const Attributes& a) {
    const bool is_ragged = a.operands.has(operands::kQueryStarts);
    if (a.rows_per_sequence < 0 || (is_ragged && a.rows_per_sequence != 0)) {
      return invalid_argument(
          concat("rows_per_sequence must be 0 with query_starts, else at least 0, got ",
                 a.rows_per_sequence));
    }
    return check_layout(a.layout, a.options.is_fused);
  }
  static Types types(const Attributes& a) {
    Types types;
    if (a.options.out_float32) types.output = Types::DataType::F32;
    return types;
  }

  static Arrays<Problem> operands(const Attributes& a) {
    const auto caches = cache_arrays<Problem, &Problem::key_cache, &Problem::value_cache>(
        a.layout, a.options.is_fused);
    const Arrays<Problem> index{
        array<&Problem::index, &CachedIndex::key_lengths>(operands::kCacheKeyLengths),
        array<&Problem::index, &CachedIndex::query_offset>(operands::kCacheQueryOffset),
        array<&Problem::index, &CachedIndex::block_tables>(operands::kBlockTables),
        array<&Problem::index, &CachedIndex::query_starts>(operands::kQueryStarts),
        array<&Problem::index, &CachedIndex::query_lengths>(operands::kRowLengths),
        array<&Problem::index, &CachedIndex::key_starts>(operands::kKeyStarts),
    };
    return joined<Problem>({{array<&Problem::query>(operands::kCachedQuery)}, caches, index});
  }
  static Arrays<Problem> results(const Attributes&) {
    return {
        array<&Problem::out>(operands::kCachedOut),
        array<&Problem::lse>(operands::kCachedLse),
        workspace(kWorkspaceAlignment),
        array<&Problem::counters>(operands::kCounters),
    };
  }
  static void fill(const Attributes& a, const Extents& extents, Problem& problem) {
    const CachedOptions& o = a.options;
    Shape& shape = problem.shape;
    problem.is_ragged = a.operands.has(operands::kQueryStarts);
    problem.has_block_tables = a.operands.has(operands::kBlockTables);
    problem.cache = cache_shape(extents, a.layout, o.is_fused, problem.has_block_tables);
    problem.tokens = extents['T'];
    problem.num_starts = extents['R'];
    problem.rows = extents['L'];
    shape.seqlen_q = problem.is_ragged ? problem.tokens : a.rows_per_sequence;
    shape.seqlen_k = problem.cache.capacity();
    if (o.is_fused) shape.num_heads_kv = extents['L'] / 2;
    problem.window_left = o.window_left;
    problem.window_right = o.window_right;
    problem.softmax_scale = o.scale;
    problem.rescale_threshold = o.rescale_threshold;
    problem.out_float32 = o.out_float32;
    problem.num_counters = extents['C'];
  }

  static Status validate(const Problem& problem) {
    const Shape& s = problem.shape;
    const bool has_block_tables = problem.has_block_tables;
    JFA_CHECK_OK(check_fused_rows(problem.cache, problem.rows));
    JFA_CHECK_OK(check_cache(problem.cache, s, has_block_tables));
    JFA_CHECK_OK(check_shape(s));
    JFA_CHECK_OK(check_mask({problem.window_left, problem.window_right, 0}));
    if (problem.is_ragged && problem.num_starts != s.batch + 1) {
      return invalid_argument(concat("query_starts must have shape [", s.batch + 1, "], got [",
                                     problem.num_starts, "]"));
    }
    const auto tokens = checked_product("query rows", {s.batch, s.seqlen_q});
    if (!problem.is_ragged && (!tokens.ok() || tokens.value() != problem.tokens)) {
      return invalid_argument(concat("query must have batch * rows_per_sequence = ", s.batch, " * ",
                                     s.seqlen_q, " rows, got ", problem.tokens));
    }
    if (!(problem.softmax_scale > 0) || !std::isfinite(problem.softmax_scale)) {
      return invalid_argument(
          concat("scale must be positive and finite, got ", problem.softmax_scale));
    }
    if (problem.rescale_threshold >= 0 && std::isfinite(problem.rescale_threshold)) return {};
    return invalid_argument(concat("rescale_threshold must be non-negative and finite, got ",
                                   problem.rescale_threshold));
  }

  static int sm_margin(const Attributes& a) { return a.options.sm_margin; }
  static StatusOr<ForwardCachedPlan> plan(const Problem& problem, int num_sms) {
    static PlanCache<ForwardCachedPlan, Shape, bool, int, int> cache;
    const auto make = [](const Shape& shape, bool is_ragged, int page_size, int num_sms) {
      return plan_forward_cached(shape, is_ragged, page_size,
                                 KernelTable<ForwardCached>::compiled(), num_sms);
    };
    const int page_size = problem.has_block_tables ? static_cast<int>(problem.cache.page_size) : 0;
    return cache.get(make, problem.shape, problem.is_ragged, page_size, num_sms);
  }
  static Status launch(const ForwardCachedPlan& plan, const Problem& problem, CUstream_st* stream) {
    JFA_CHECK_OK(check_workspace(plan.workspace_bytes, problem.workspace_bytes));
    if (problem.num_counters < plan.num_counters) {
      return invalid_argument(concat("counters must have ", plan.num_counters, " elements, got ",
                                     problem.num_counters));
    }
    return KernelTable<ForwardCached>::launch(plan, problem, stream);
  }

 private:
  static constexpr std::uintptr_t kWorkspaceAlignment = 16;  // bytes, of a vector of floats
};

}  // namespace jax_fa3

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::CachedOptions,
                                      xla::ffi::StructMember<float>("scale"),
                                      xla::ffi::StructMember<std::int32_t>("window_left"),
                                      xla::ffi::StructMember<std::int32_t>("window_right"),
                                      xla::ffi::StructMember<float>("rescale_threshold"),
                                      xla::ffi::StructMember<std::int32_t>("sm_margin"),
                                      xla::ffi::StructMember<bool>("is_fused"),
                                      xla::ffi::StructMember<bool>("out_float32"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::ForwardCachedAttributes,
                                      xla::ffi::StructMember<jax_fa3::Names>("operands"),
                                      xla::ffi::StructMember<jax_fa3::Names>("results"),
                                      xla::ffi::StructMember<jax_fa3::CachedOptions>("options"),
                                      xla::ffi::StructMember<std::string_view>("layout"),
                                      xla::ffi::StructMember<std::int32_t>("rows_per_sequence"));
