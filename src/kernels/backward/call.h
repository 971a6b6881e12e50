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

  static Status check(const Attributes& a) {
    JFA_CHECK_OK(check_call(a));
    if (a.results.has(operands::kDBias) && !a.operands.has(operands::kBias)) {
      return invalid_argument("operands must have bias with dbias");
    }
    if (!a.results.has(operands::kDSinks) || a.operands.has(operands::kSinks)) return {};
    return invalid_argument("operands must have sinks with dsinks");
  }
  static Types types(const Attributes&) { return {}; }

  static Arrays<Problem> operands(const Attributes&) {
    const Arrays<Problem> own{
        array<&Problem::query>(operands::kQuery), array<&Problem::key>(operands::kKey),
        array<&Problem::value>(operands::kValue), array<&Problem::out>(operands::kOut),
        array<&Problem::lse>(operands::kLse),     array<&Problem::dout>(operands::kDOut),
        array<&Problem::dlse>(operands::kDLse),
    };
    return joined<Problem>({own, index_arrays<Problem>(), score_arrays<Problem>()});
  }
  static Arrays<Problem> results(const Attributes&) {
    return {
        array<&Problem::dquery>(operands::kDQuery), array<&Problem::dkey>(operands::kDKey),
        array<&Problem::dvalue>(operands::kDValue), array<&Problem::dbias>(operands::kDBias),
        array<&Problem::dsinks>(operands::kDSinks), workspace(kWorkspaceAlignment),
    };
  }
  static void fill(const Attributes& a, const Extents& extents, Problem& problem) {
    fill_call(a.options, extents, problem);
    problem.deterministic = a.options.deterministic;
  }

  static Status validate(const Problem& problem) { return check_extents(problem); }

  static int sm_margin(const Attributes& a) { return a.options.sm_margin; }
  static StatusOr<BackwardPlan> plan(const Problem& problem, int num_sms) {
    static PlanCache<BackwardPlan, Shape, IndexPresence, bool, int> cache;
    const auto make = [](const Shape& shape, const IndexPresence& presence, bool deterministic,
                         int num_sms) {
      return plan_backward(shape, presence, deterministic, KernelTable<Backward>::compiled(),
                           num_sms);
    };
    return cache.get(make, problem.shape, problem.presence, problem.deterministic, num_sms);
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
