// The XLA handler of a kernel family: decode, validate, plan, launch. The family's call.h has a
// struct that is the table of its calls: what decode.h asks for, and
//
//   kTarget                       the custom call's name
//   Attributes                    decoded from all attributes of the call
//   validate(problem)             which values are legal
//   sm_margin(attributes)         multiprocessors to leave free
//   plan(problem, num_sms)
//   launch(plan, problem, stream)
//
// A handler never throws, synchronises, allocates device memory or reads it.
#pragma once

#include <utility>

#include "ffi/decode.h"
#include "ffi/device.h"
#include "ffi/error.h"
#include "ffi/validate.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; tests have no CUDA headers

namespace jax_fa3 {

template <class Call>
Status validate(const typename Call::Problem& problem, const Device& device) {
  JFA_CHECK_OK(check_device(device));
  return Call::validate(problem);
}

template <class Call>
Status run(CUstream_st* stream, const xla::ffi::RemainingArgs& args,
           const xla::ffi::RemainingRets& rets, const typename Call::Attributes& attributes) {
  JFA_TRY(problem, decode<Call>(args, rets, attributes, Addresses::kChecked));
  JFA_TRY(device, current_device());
  JFA_CHECK_OK(validate<Call>(problem, device));
  JFA_TRY(num_sms, num_sms_to_fill(device, Call::sm_margin(attributes)));
  JFA_TRY(plan, Call::plan(problem, num_sms));
  return Call::launch(plan, problem, stream);
}

template <class Call>
xla::ffi::Error handle(CUstream_st* stream, xla::ffi::RemainingArgs args,
                       xla::ffi::RemainingRets rets, const typename Call::Attributes& attributes) {
  return to_ffi(run<Call>(stream, args, rets, attributes), Call::kTarget);
}

// What a call of any family binds, after the context.
template <class Call, class Binding>
auto bind_call(Binding binding) {
  return std::move(binding)
      .RemainingArgs()
      .RemainingRets()
      .template Attrs<typename Call::Attributes>();
}

}  // namespace jax_fa3

#define JFA_HANDLER(symbol, Call)                                                   \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                    \
      symbol, ::jax_fa3::handle<Call>,                                              \
      ::jax_fa3::bind_call<Call>(                                                   \
          ::xla::ffi::Ffi::Bind().Ctx<::xla::ffi::PlatformStream<CUstream_st*>>()), \
      {::xla::ffi::Traits::kCmdBufferCompatible})
