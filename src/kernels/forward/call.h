// The custom call of the forward pass.
#pragma once

#include <cmath>

#include "call/text.h"
#include "ffi/function.h"
#include "ffi/handler.h"
#include "ffi/options.h"
#include "ffi/plan_cache.h"
#include "kernels/forward/family.h"

namespace jax_fa3 {

struct ForwardCall : ArrayTable<ForwardProblem> {
  static constexpr const char* kTarget = "jax_fa3_forward";
  using Attributes = CallAttributes;

  static Status check(const Attributes& a) {
    JFA_CHECK_OK(check_options(a.options));
    const float threshold = a.options.rescale_threshold;
    if (threshold >= 0 && std::isfinite(threshold)) return {};
    return invalid_argument(
        concat("rescale_threshold must be non-negative and finite, got ", threshold));
  }
  static Types types(const Attributes&) { return {}; }

  static const Arrays<Problem>& operands(const Attributes&) {
    static const Arrays<Problem> table = all_arrays<Problem>({
        array<&Problem::query>(operands::kQuery),
        array<&Problem::key>(operands::kKey),
        array<&Problem::value>(operands::kValue),
    });
    return table;
  }
  static const Arrays<Problem>& results(const Attributes&) {
    static const Arrays<Problem> table{
        array<&Problem::out>(operands::kOut),
        array<&Problem::lse>(operands::kLse),
        array<&Problem::max_logits>(operands::kMaxLogits),
        array<&Problem::tile_counter>(operands::kTileCounter),
    };
    return table;
  }
  static void fill(const Attributes& a, const Extents& extents, Problem& problem) {
    fill_call(a.options, extents, problem);
    problem.rescale_threshold = a.options.rescale_threshold;
  }

  static Status validate(const Problem& problem) { return check_call(problem); }

  static int sm_margin(const Attributes& a) { return a.options.sm_margin; }
  static StatusOr<ForwardPlan> plan(const Problem& problem, int num_sms) {
    static PlanCache<ForwardPlan, Shape, MaskOptions, IndexPresence, int> cache;
    const auto make = [](const Shape& shape, const MaskOptions& mask, const IndexPresence& presence,
                         int num_sms) {
      return plan_forward(shape, mask, presence, KernelTable<Forward>::compiled(), num_sms);
    };
    return cache.get(make, problem.shape, problem.mask, problem.presence, num_sms);
  }
  static Status launch(const ForwardPlan& plan, const Problem& problem, CUstream_st* stream) {
    return KernelTable<Forward>::launch(plan, problem, stream);
  }
};

// The same with score and mask functions.
struct FlexForwardCall : WithFunctions<ForwardCall> {
  static constexpr const char* kTarget = "jax_fa3_flex_forward";
};

}  // namespace jax_fa3
