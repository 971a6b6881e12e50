// The backward handler: decode, validate, plan, launch.
#include <cuda_runtime_api.h>

#include "ffi/decode.h"
#include "ffi/error.h"
#include "ffi/handlers.h"
#include "ffi/plan_cache.h"
#include "ffi/validate.h"
#include "kernels/backward/dispatch.h"

namespace jax_fa3 {
namespace {

namespace ffi = xla::ffi;

StatusOr<BackwardPlan> plan(const BackwardProblem& problem, int num_sms) {
  static PlanCache<BackwardPlan> cache;
  const int variant = 2 * num_sms + problem.deterministic;
  return cache.get(problem.shape, problem.mask, variant, [&] {
    return plan_backward(problem.shape, problem.deterministic, compiled_backward_kernels(),
                         num_sms);
  });
}

Status run(const BackwardBuffers& buffers, const Options& options, cudaStream_t stream) {
  JFA_TRY(problem, decode_backward(buffers, options));
  JFA_TRY(device, current_device());
  JFA_CHECK_OK(validate(problem, device));
  JFA_TRY(num_sms, num_sms_to_fill(device, options.sm_margin));
  JFA_TRY(chosen, plan(problem, num_sms));
  JFA_CHECK_OK(validate_workspace(chosen.workspace_bytes,
                                  static_cast<std::int64_t>(buffers.workspace.size_bytes())));
  if (problem.shape.batch == 0) return {};
  return dispatch_backward(chosen, problem, stream);
}

ffi::Error backward(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                    ffi::AnyBuffer value, ffi::AnyBuffer out, ffi::AnyBuffer lse,
                    ffi::AnyBuffer dout, ffi::RemainingArgs rest,
                    ffi::Result<ffi::AnyBuffer> dquery, ffi::Result<ffi::AnyBuffer> dkey,
                    ffi::Result<ffi::AnyBuffer> dvalue, ffi::Result<ffi::AnyBuffer> workspace,
                    Options options) {
  const BackwardBuffers buffers{query, key,     value, out,     lse,       dout,
                                rest,  *dquery, *dkey, *dvalue, *workspace};
  return to_ffi(run(buffers, options, stream), "jax_fa3_backward");
}

}  // namespace
}  // namespace jax_fa3

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_backward, jax_fa3::backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // query
                                  .Arg<xla::ffi::AnyBuffer>()  // key
                                  .Arg<xla::ffi::AnyBuffer>()  // value
                                  .Arg<xla::ffi::AnyBuffer>()  // out
                                  .Arg<xla::ffi::AnyBuffer>()  // lse
                                  .Arg<xla::ffi::AnyBuffer>()  // dout
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()  // dquery
                                  .Ret<xla::ffi::AnyBuffer>()  // dkey
                                  .Ret<xla::ffi::AnyBuffer>()  // dvalue
                                  .Ret<xla::ffi::AnyBuffer>()  // workspace
                                  .Attr<jax_fa3::Options>("options"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
