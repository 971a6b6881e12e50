// The handler that rounds 16-bit arrays to e4m3: decode, validate, launch.
#include "kernels/quantize/quantize.h"

#include <cuda_runtime_api.h>

#include "ffi/decode.h"
#include "ffi/error.h"
#include "ffi/handlers.h"
#include "ffi/validate.h"

namespace jax_fa3 {
namespace {

namespace ffi = xla::ffi;

Status run(const QuantizeBuffers& buffers, const QuantizeOptions& options, cudaStream_t stream) {
  JFA_TRY(problem, decode_quantize(buffers, options));
  JFA_CHECK_OK(check_quantize(problem.shape));
  JFA_TRY(device, current_device());
  JFA_CHECK_OK(validate(problem, device));
  JFA_CHECK_OK(launch_quantize_rows(problem, stream));
  return launch_quantize_value(problem, stream);
}

ffi::Error quantize(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                    ffi::AnyBuffer value, ffi::RemainingArgs rest,
                    ffi::Result<ffi::AnyBuffer> query_out, ffi::Result<ffi::AnyBuffer> key_out,
                    ffi::Result<ffi::AnyBuffer> value_out,
                    ffi::Result<ffi::AnyBuffer> query_descale,
                    ffi::Result<ffi::AnyBuffer> key_descale,
                    ffi::Result<ffi::AnyBuffer> value_descale, std::uint32_t seed, bool back,
                    bool prepare_value, bool has_query_lengths, bool has_key_lengths) {
  const QuantizeBuffers buffers{query,    key,        value,          rest,         *query_out,
                                *key_out, *value_out, *query_descale, *key_descale, *value_descale};
  const QuantizeOptions options{seed, back, prepare_value, has_query_lengths, has_key_lengths};
  return to_ffi(run(buffers, options, stream), "jax_fa3_quantize");
}

}  // namespace
}  // namespace jax_fa3

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_quantize, jax_fa3::quantize,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // query
                                  .Arg<xla::ffi::AnyBuffer>()  // key
                                  .Arg<xla::ffi::AnyBuffer>()  // value
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()  // query_out
                                  .Ret<xla::ffi::AnyBuffer>()  // key_out
                                  .Ret<xla::ffi::AnyBuffer>()  // value_out
                                  .Ret<xla::ffi::AnyBuffer>()  // query_descale
                                  .Ret<xla::ffi::AnyBuffer>()  // key_descale
                                  .Ret<xla::ffi::AnyBuffer>()  // value_descale
                                  .Attr<std::uint32_t>("seed")
                                  .Attr<bool>("back")
                                  .Attr<bool>("prepare_value")
                                  .Attr<bool>("has_query_lengths")
                                  .Attr<bool>("has_key_lengths"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
