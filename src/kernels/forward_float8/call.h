// The custom call of the forward pass on e4m3 arrays.
#pragma once

#include "ffi/handler.h"
#include "ffi/options.h"
#include "ffi/plan_cache.h"
#include "kernels/forward_float8/family.h"

namespace jax_fa3 {

struct ForwardFloat8Call : ArrayTable<ForwardFloat8Problem> {
  static constexpr const char* kTarget = "jax_fa3_forward_float8";
  using Attributes = CallAttributes;  // rescale_threshold has no meaning

  static Status check(const Attributes& a) {
    if (a.options.softcap > 0) return unimplemented("the float8 kernels have no softcap");
    return check_options(a.options);
  }
  static Types types(const Attributes&) {
    return {Types::DataType::F8E4M3FN, /*output=*/Types::kAny16Bit};
  }

  static Arrays<Problem> operands(const Attributes& a) {
    const Arrays<Problem> own{
        array<&Problem::query>(operands::kQuery),
        array<&Problem::key>(operands::kKey),
        array<&Problem::value>(is_prepared(a) ? operands::kPreparedValue : operands::kValue),
        array<&Problem::query_descale>(operands::kQueryDescale),
        array<&Problem::key_descale>(operands::kKeyDescale),
        array<&Problem::value_descale>(operands::kValueDescale),
    };
    return joined<Problem>({own, index_arrays<Problem>()});
  }
  static Arrays<Problem> results(const Attributes&) {
    return {
        array<&Problem::out>(operands::kOut),
        array<&Problem::lse>(operands::kLse),
        array<&Problem::tile_counter>(operands::kTileCounter),
        workspace(kWorkspaceAlignment),
    };
  }
  static void fill(const Attributes& a, const Extents& extents, Problem& problem) {
    fill_call(a.options, extents, problem);
    problem.query_descales = extents['m'];
    problem.key_descales = extents['n'];
    problem.value_is_prepared = is_prepared(a);
  }

  static Status validate(const Problem& problem) { return check_extents(problem); }

  static int sm_margin(const Attributes& a) { return a.options.sm_margin; }
  static StatusOr<ForwardFloat8Plan> plan(const Problem& problem, int num_sms) {
    static PlanCache<ForwardFloat8Plan, Shape, MaskOptions, IndexPresence, bool, int> cache;
    const auto make = [](const Shape& shape, const MaskOptions& mask, const IndexPresence& presence,
                         bool value_is_prepared, int num_sms) {
      return plan_forward_float8(shape, mask, presence, value_is_prepared,
                                 KernelTable<ForwardFloat8>::compiled(), num_sms);
    };
    return cache.get(make, problem.shape, problem.mask, problem.presence, problem.value_is_prepared,
                     num_sms);
  }
  static Status launch(const ForwardFloat8Plan& plan, const Problem& problem, CUstream_st* stream) {
    JFA_CHECK_OK(check_workspace(plan.workspace_bytes, problem.workspace_bytes));
    return KernelTable<ForwardFloat8>::launch(plan, problem, stream);
  }

 private:
  static bool is_prepared(const Attributes& a) { return a.operands.has(operands::kPreparedValue); }

  static constexpr std::uintptr_t kWorkspaceAlignment = 16;  // bytes, as TMA reads value
};

}  // namespace jax_fa3
