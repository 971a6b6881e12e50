// The custom calls on the host, as far as decoding: tests/test_decoding.py registers them in place
// of the kernels' handlers, of which they have bindings, tables and checks. Only addresses are not
// looked at: XLA aligns less on a CPU.
#include "ffi/handler.h"
#include "kernels/append/call.h"
#include "kernels/backward/call.h"
#include "kernels/dense_mask/call.h"
#include "kernels/forward/call.h"
#include "kernels/forward_cached/call.h"
#include "kernels/forward_float8/call.h"
#include "kernels/quantize/call.h"
#include "kernels/visibility/call.h"

namespace jax_fa3 {
namespace {

namespace ffi = xla::ffi;

constexpr Device kHopper{9, 0, 132};

template <class Call>
Status accept(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
              const typename Call::Attributes& attributes) {
  JFA_TRY(problem, decode<Call>(args, rets, attributes, Addresses::kUnchecked));
  return validate<Call>(problem, kHopper);
}

template <class Call>
ffi::Error answer(ffi::RemainingArgs args, ffi::RemainingRets rets,
                  const typename Call::Attributes& attributes) {
  return to_ffi(accept<Call>(args, rets, attributes), "decode");
}

}  // namespace
}  // namespace jax_fa3

#define DECODING_HANDLER(symbol, Call)                                  \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, jax_fa3::answer<jax_fa3::Call>, \
                                jax_fa3::bind_call<jax_fa3::Call>(xla::ffi::Ffi::Bind()))

DECODING_HANDLER(jax_fa3_forward, ForwardCall);
DECODING_HANDLER(jax_fa3_forward_float8, ForwardFloat8Call);
DECODING_HANDLER(jax_fa3_backward, BackwardCall);
DECODING_HANDLER(jax_fa3_quantize, QuantizeCall);
DECODING_HANDLER(jax_fa3_visibility, VisibilityCall);
DECODING_HANDLER(jax_fa3_dense_mask, DenseMaskCall);
DECODING_HANDLER(jax_fa3_forward_cached, ForwardCachedCall);
DECODING_HANDLER(jax_fa3_append, AppendCall);
DECODING_HANDLER(jax_fa3_flex_forward, FlexForwardCall);
DECODING_HANDLER(jax_fa3_flex_backward, FlexBackwardCall);
