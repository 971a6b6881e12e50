// The custom call of the forward pass on e4m3 arrays.
#pragma once

#include "ffi/handler.h"
#include "ffi/options.h"
#include "ffi/plan_cache.h"
#include "kernels/forward_float8/family.h"

namespace jax_fa3 {

struct ForwardFloat8Attributes {
  Options options;  // rescale_threshold has no meaning
  bool value_is_prepared;
};

struct ForwardFloat8Call : ArrayTable<ForwardFloat8Problem> {
  static constexpr const char* kTarget = "jax_fa3_forward_float8";
  using Attributes = ForwardFloat8Attributes;

  static Status check(const Attributes& a) {
    const Options& options = a.options;
    JFA_CHECK_OK(check_forward(options));
    const bool has_more = options.has_bias || options.has_dense_mask || options.has_sinks ||
                          options.has_alibi_slopes || options.has_max_logits || options.softcap > 0;
    if (!has_more) return {};
    return unimplemented(
        "the float8 kernels have no bias, dense mask, sinks, slopes, softcap or max_logits");
  }
  static Types types(const Attributes&) {
    return {Types::DataType::F8E4M3FN, /*output=*/Types::kAny16Bit};
  }

  static Arrays<Problem> operands(const Attributes& a) {
    return with_index(
        {
            array<&Problem::query>(operands::kQuery),
            array<&Problem::key>(operands::kKey),
            array<&Problem::value>(a.value_is_prepared ? operands::kPreparedValue
                                                       : operands::kValue),
            array<&Problem::query_descale>(operands::kQueryDescale),
            array<&Problem::key_descale>(operands::kKeyDescale),
            array<&Problem::value_descale>(operands::kValueDescale),
        },
        a.options);
  }
  static Arrays<Problem> results(const Attributes&) {
    return {
        array<&Problem::out>(operands::kOut),
        array<&Problem::lse>(operands::kLse),
        array<&Problem::tile_counter>(operands::kTileCounter),
        workspace<&Problem::workspace>(kWorkspaceAlignment),
    };
  }
  static void fill(const Attributes& a, const Extents& extents, Problem& problem) {
    fill_call(a.options, extents, problem);
    problem.query_descales = extents['m'];
    problem.key_descales = extents['n'];
    problem.value_is_prepared = a.value_is_prepared;
    problem.workspace_bytes = extents['w'];
  }

  static Status validate(const Problem& problem) { return check_call(problem); }

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
  static constexpr std::uintptr_t kWorkspaceAlignment = 16;  // bytes, as TMA reads value
};

}  // namespace jax_fa3

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::ForwardFloat8Attributes,
                                      xla::ffi::StructMember<jax_fa3::Options>("options"),
                                      xla::ffi::StructMember<bool>("value_is_prepared"));
