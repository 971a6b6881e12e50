// The handler of the forward pass on e4m3 arrays: decode, validate, plan, launch.
#include <cuda_runtime_api.h>

#include "ffi/decode.h"
#include "ffi/error.h"
#include "ffi/handlers.h"
#include "ffi/plan_cache.h"
#include "ffi/validate.h"
#include "kernels/forward_float8/dispatch.h"

namespace jax_fa3 {
namespace {

namespace ffi = xla::ffi;

StatusOr<ForwardFloat8Plan> plan(const ForwardFloat8Problem& problem, int num_sms) {
  static PlanCache<ForwardFloat8Plan> cache;
  const int variant = 2 * num_sms + problem.value_is_prepared;
  return cache.get(problem.shape, problem.mask, variant, [&] {
    return plan_forward_float8(problem.shape, problem.mask, problem.value_is_prepared,
                               compiled_forward_float8_kernels(), num_sms);
  });
}

Status run(const ForwardFloat8Buffers& buffers, const Options& options, bool value_is_prepared,
           cudaStream_t stream) {
  JFA_TRY(problem, decode_forward_float8(buffers, options, value_is_prepared));
  JFA_TRY(device, current_device());
  JFA_CHECK_OK(validate(problem, device));
  JFA_TRY(num_sms, num_sms_to_fill(device, options.sm_margin));
  JFA_TRY(chosen, plan(problem, num_sms));
  JFA_CHECK_OK(validate_workspace(chosen.workspace_bytes,
                                  static_cast<std::int64_t>(buffers.workspace.size_bytes())));
  if (chosen.num_tiles == 0) return {};
  return dispatch_forward_float8(chosen, problem, stream);
}

ffi::Error forward_float8(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                          ffi::AnyBuffer value, ffi::AnyBuffer query_descale,
                          ffi::AnyBuffer key_descale, ffi::AnyBuffer value_descale,
                          ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out,
                          ffi::Result<ffi::AnyBuffer> lse, ffi::Result<ffi::AnyBuffer> tile_counter,
                          ffi::Result<ffi::AnyBuffer> workspace, Options options,
                          bool value_is_prepared) {
  const ForwardFloat8Buffers buffers{query, key,  value, query_descale, key_descale, value_descale,
                                     rest,  *out, *lse,  *tile_counter, *workspace};
  return to_ffi(run(buffers, options, value_is_prepared, stream), "jax_fa3_forward_float8");
}

}  // namespace
}  // namespace jax_fa3

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_forward_float8, jax_fa3::forward_float8,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // query
                                  .Arg<xla::ffi::AnyBuffer>()  // key
                                  .Arg<xla::ffi::AnyBuffer>()  // value
                                  .Arg<xla::ffi::AnyBuffer>()  // query_descale
                                  .Arg<xla::ffi::AnyBuffer>()  // key_descale
                                  .Arg<xla::ffi::AnyBuffer>()  // value_descale
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Ret<xla::ffi::AnyBuffer>()  // lse
                                  .Ret<xla::ffi::AnyBuffer>()  // tile counter
                                  .Ret<xla::ffi::AnyBuffer>()  // workspace
                                  .Attr<jax_fa3::Options>("options")
                                  .Attr<bool>("value_is_prepared"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
