// The custom calls on the host, as far as decoding: tests/test_decoding.py registers them in place
// of the kernels' handlers, with the operands, results and attributes that those bind.
#include "ffi/decode.h"
#include "ffi/error.h"

namespace jax_fa3 {
namespace {

namespace ffi = xla::ffi;
using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

template <class Problem>
ffi::Error answer(const StatusOr<Problem>& problem) {
  return to_ffi(problem.ok() ? Status() : problem.status(), "decode");
}

ffi::Error forward(Buffer query, Buffer key, Buffer value, ffi::RemainingArgs rest, Result out,
                   Result lse, Result tile_counter, Options options) {
  return answer(decode_forward({query, key, value, rest, *out, *lse, *tile_counter}, options));
}

ffi::Error forward_float8(Buffer query, Buffer key, Buffer value, Buffer query_descale,
                          Buffer key_descale, Buffer value_descale, ffi::RemainingArgs rest,
                          Result out, Result lse, Result tile_counter, Result workspace,
                          Options options, bool value_is_prepared) {
  return answer(decode_forward_float8({query, key, value, query_descale, key_descale, value_descale,
                                       rest, *out, *lse, *tile_counter, *workspace},
                                      options, value_is_prepared));
}

ffi::Error backward(Buffer query, Buffer key, Buffer value, Buffer out, Buffer lse, Buffer dout,
                    ffi::RemainingArgs rest, Result dquery, Result dkey, Result dvalue,
                    Result workspace, Options options) {
  return answer(decode_backward(
      {query, key, value, out, lse, dout, rest, *dquery, *dkey, *dvalue, *workspace}, options));
}

ffi::Error quantize(Buffer query, Buffer key, Buffer value, ffi::RemainingArgs rest,
                    Result query_out, Result key_out, Result value_out, Result query_descale,
                    Result key_descale, Result value_descale, std::uint32_t seed, bool back,
                    bool prepare_value, bool has_query_lengths, bool has_key_lengths) {
  return answer(decode_quantize({query, key, value, rest, *query_out, *key_out, *value_out,
                                 *query_descale, *key_descale, *value_descale},
                                {seed, back, prepare_value, has_query_lengths, has_key_lengths}));
}

}  // namespace
}  // namespace jax_fa3

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_forward, jax_fa3::forward,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<jax_fa3::Options>("options"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_forward_float8, jax_fa3::forward_float8,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<jax_fa3::Options>("options")
                                  .Attr<bool>("value_is_prepared"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_backward, jax_fa3::backward,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<jax_fa3::Options>("options"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_quantize, jax_fa3::quantize,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<std::uint32_t>("seed")
                                  .Attr<bool>("back")
                                  .Attr<bool>("prepare_value")
                                  .Attr<bool>("has_query_lengths")
                                  .Attr<bool>("has_key_lengths"));
