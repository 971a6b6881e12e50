// The custom call of the backward pass.
#pragma once

#include "ffi/function.h"
#include "ffi/handler.h"
#include "ffi/options.h"
#include "ffi/plan_cache.h"
#include "kernels/backward/family.h"

namespace jax_fa3 {

struct BackwardCall : ArrayTable<BackwardProblem> {
  static constexpr const char* kTarget = "jax_fa3_backward";
  using Attributes = CallAttributes;

  static Status check(const Attributes& a) { return check_options(a.options); }
  static Types types(const Attributes&) { return {}; }

  static const Arrays<Problem>& operands(const Attributes&) {
    static const Arrays<Problem> table = all_arrays<Problem>({
        array<&Problem::query>(operands::kQuery),
        array<&Problem::key>(operands::kKey),
        array<&Problem::value>(operands::kValue),
        array<&Problem::out>(operands::kOut),
        array<&Problem::lse>(operands::kLse),
        array<&Problem::dout>(operands::kDOut),
        array<&Problem::dlse>(operands::kDLse),
    });
    return table;
  }
  static const Arrays<Problem>& results(const Attributes&) {
    static const Arrays<Problem> table{
        array<&Problem::dquery>(operands::kDQuery), array<&Problem::dkey>(operands::kDKey),
        array<&Problem::dvalue>(operands::kDValue), array<&Problem::dbias>(operands::kDBias),
        array<&Problem::dsinks>(operands::kDSinks), workspace(kWorkspaceAlignment),
    };
    return table;
  }
  static void fill(const Attributes& a, const Extents& extents, Problem& problem) {
    fill_call(a.options, extents, problem);
    problem.deterministic = a.options.deterministic;
  }

  static Status validate(const Problem& problem) {
    if (problem.dbias != nullptr && problem.dense.bias == nullptr) {
      return invalid_argument("operands must have bias with dbias");
    }
    if (problem.dsinks != nullptr && problem.sinks.values == nullptr) {
      return invalid_argument("operands must have sinks with dsinks");
    }
    return check_call(problem);
  }

  static int sm_margin(const Attributes& a) { return a.options.sm_margin; }
  static StatusOr<BackwardPlan> plan(const Problem& problem, int num_sms) {
    static PlanCache<BackwardPlan, Shape, MaskOptions, IndexPresence, bool, int> cache;
    const auto make = [](const Shape& shape, const MaskOptions& mask, const IndexPresence& presence,
                         bool deterministic, int num_sms) {
      return plan_backward(shape, mask, presence, deterministic, KernelTable<Backward>::compiled(),
                           num_sms);
    };
    return cache.get(make, problem.shape, problem.mask, problem.presence, problem.deterministic,
                     num_sms);
  }
  static Status launch(const BackwardPlan& plan, const Problem& problem, CUstream_st* stream) {
    JFA_CHECK_OK(check_workspace(plan.workspace_bytes, problem.workspace_bytes));
    return KernelTable<Backward>::launch(plan, problem, stream);
  }

 private:
  static constexpr std::uintptr_t kWorkspaceAlignment = 256;  // bytes, of each of its parts
};

// The same with score and mask functions.
struct FlexBackwardCall : WithFunctions<BackwardCall> {
  static constexpr const char* kTarget = "jax_fa3_flex_backward";
};

}  // namespace jax_fa3
