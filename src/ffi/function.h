// The attributes of a call with score or mask functions, and what its two directions do alike: they
// launch kernels that the call brings along.
#pragma once

#include "call/operands.h"
#include "ffi/handler.h"
#include "ffi/linked_kernels.h"
#include "ffi/options.h"

namespace jax_fa3 {

struct FunctionAttributes {
  Names operands;
  Names results;
  Options options;
  LinkedKernel kernel;
  LinkedKernel dquery_kernel;  // backward only, where dQ has one of its own

  CallAttributes of_call() const { return {operands, results, options}; }
};

inline Status check_function(const FunctionAttributes& a) {
  if (!a.kernel.is_there()) return invalid_argument("kernel must not be empty");
  const auto has = [&](const Operand& operand) { return a.operands.has(operand); };
  if (!has(operands::kBias) && !has(operands::kDenseMask) && !has(operands::kAlibiSlopes) &&
      a.options.softcap == 0) {
    return {};
  }
  return unimplemented("no kernel has a function and a dense array, softcap or alibi_slopes");
}

// The same of the custom call `Call`, of a call without functions.
template <class Call>
struct WithFunctions : Call {
  using typename Call::Problem;
  using Attributes = FunctionAttributes;

  static Status check(const Attributes& a) {
    JFA_CHECK_OK(Call::check(a.of_call()));
    return check_function(a);
  }
  static Types types(const Attributes& a) { return Call::types(a.of_call()); }
  static Arrays<Problem> operands(const Attributes& a) {
    return joined<Problem>({Call::operands(a.of_call()), function_arrays<Problem>()});
  }
  static Arrays<Problem> results(const Attributes& a) { return Call::results(a.of_call()); }
  static void fill(const Attributes& a, const Extents& extents, Problem& problem) {
    Call::fill(a.of_call(), extents, problem);
    problem.function.blocks_shape.rows = problem.shape.seqlen_q;
    problem.function.kernel_key = a.kernel.key;
    problem.function.dquery_kernel_key = a.dquery_kernel.key;
  }
  static int sm_margin(const Attributes& a) { return Call::sm_margin(a.of_call()); }

  template <class Plan>
  static Status launch(const Plan& plan, Problem problem, CUstream_st* stream) {
    FunctionArrays& function = problem.function;
    JFA_TRY(kernel, handle_of(function.kernel_key));
    JFA_TRY(dquery_kernel, handle_of(function.dquery_kernel_key));
    function.kernel = kernel;
    function.dquery_kernel = dquery_kernel;
    return Call::launch(plan, problem, stream);
  }
};

// The handler of a program's instantiation.
inline xla::ffi::Error load_kernels(const FunctionAttributes& a, const char* target) {
  const auto load_all = [&]() -> Status {
    JFA_CHECK_OK(load(a.kernel));
    return load(a.dquery_kernel);
  };
  return to_ffi(load_all(), target);
}

}  // namespace jax_fa3

// The handlers of both stages.
#define JFA_FUNCTION_HANDLER(symbol, Call)                         \
  JFA_HANDLER(symbol, Call);                                       \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                   \
      symbol##_instantiate,                                        \
      [](const ::jax_fa3::FunctionAttributes& attributes) {        \
        return ::jax_fa3::load_kernels(attributes, Call::kTarget); \
      },                                                           \
      ::xla::ffi::Ffi::BindInstantiate().Attrs<::jax_fa3::FunctionAttributes>())

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_fa3::FunctionAttributes, xla::ffi::StructMember<jax_fa3::Names>("operands"),
    xla::ffi::StructMember<jax_fa3::Names>("results"),
    xla::ffi::StructMember<jax_fa3::Options>("options"),
    xla::ffi::StructMember<jax_fa3::LinkedKernel>("kernel"),
    xla::ffi::StructMember<jax_fa3::LinkedKernel>("dquery_kernel"));
