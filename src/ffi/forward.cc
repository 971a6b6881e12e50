// The forward handler: decode, validate, plan, launch.
#include <cuda_runtime_api.h>

#include "ffi/decode.h"
#include "ffi/error.h"
#include "ffi/handlers.h"
#include "ffi/plan_cache.h"
#include "ffi/validate.h"
#include "kernels/forward/dispatch.h"

namespace jax_fa3 {
namespace {

namespace ffi = xla::ffi;

StatusOr<ForwardPlan> plan(const ForwardProblem& problem, int num_sms) {
  static PlanCache<ForwardPlan> cache;
  return cache.get(problem.shape, problem.mask, num_sms, [&] {
    return plan_forward(problem.shape, problem.mask, compiled_forward_kernels(), num_sms);
  });
}

Status run(const ForwardBuffers& buffers, const Options& options, cudaStream_t stream) {
  JFA_TRY(problem, decode_forward(buffers, options));
  JFA_TRY(device, current_device());
  JFA_CHECK_OK(validate(problem, device));
  JFA_TRY(num_sms, num_sms_to_fill(device, options.sm_margin));
  JFA_TRY(chosen, plan(problem, num_sms));
  if (chosen.num_tiles == 0) return {};
  return dispatch_forward(chosen, problem, stream);
}

ffi::Error forward(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                   ffi::AnyBuffer value, ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out,
                   ffi::Result<ffi::AnyBuffer> lse, ffi::Result<ffi::AnyBuffer> tile_counter,
                   Options options) {
  return to_ffi(run({query, key, value, rest, *out, *lse, *tile_counter}, options, stream),
                "jax_fa3_forward");
}

}  // namespace
}  // namespace jax_fa3

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_forward, jax_fa3::forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // query
                                  .Arg<xla::ffi::AnyBuffer>()  // key
                                  .Arg<xla::ffi::AnyBuffer>()  // value
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Ret<xla::ffi::AnyBuffer>()  // lse
                                  .Ret<xla::ffi::AnyBuffer>()  // tile counter
                                  .Attr<jax_fa3::Options>("options"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
