// From XLA's buffers to a Problem: extents are read off query, key and value, and every other
// buffer must have the rank, element type and extents that follow from them.
#pragma once

#include "call/problem.h"
#include "call/status.h"
#include "ffi/options.h"
#include "kernels/quantize/quantize.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fa3 {

struct ForwardBuffers {
  xla::ffi::AnyBuffer query;
  xla::ffi::AnyBuffer key;
  xla::ffi::AnyBuffer value;
  xla::ffi::RemainingArgs rest;  // index arrays, those that `options` announces
  xla::ffi::AnyBuffer out;
  xla::ffi::AnyBuffer lse;
  xla::ffi::AnyBuffer tile_counter;
};

struct ForwardFloat8Buffers {
  xla::ffi::AnyBuffer query;
  xla::ffi::AnyBuffer key;
  xla::ffi::AnyBuffer value;
  xla::ffi::AnyBuffer query_descale;
  xla::ffi::AnyBuffer key_descale;
  xla::ffi::AnyBuffer value_descale;
  xla::ffi::RemainingArgs rest;  // index arrays, those that `options` announces
  xla::ffi::AnyBuffer out;
  xla::ffi::AnyBuffer lse;
  xla::ffi::AnyBuffer tile_counter;
  xla::ffi::AnyBuffer workspace;
};

struct BackwardBuffers {
  xla::ffi::AnyBuffer query;
  xla::ffi::AnyBuffer key;
  xla::ffi::AnyBuffer value;
  xla::ffi::AnyBuffer out;
  xla::ffi::AnyBuffer lse;
  xla::ffi::AnyBuffer dout;
  xla::ffi::RemainingArgs rest;  // dlse, then index arrays, those that `options` announces
  xla::ffi::AnyBuffer dquery;
  xla::ffi::AnyBuffer dkey;
  xla::ffi::AnyBuffer dvalue;
  xla::ffi::AnyBuffer workspace;
};

struct QuantizeBuffers {
  xla::ffi::AnyBuffer query;
  xla::ffi::AnyBuffer key;
  xla::ffi::AnyBuffer value;
  xla::ffi::RemainingArgs rest;  // lengths, those that `options` announces
  xla::ffi::AnyBuffer query_out;
  xla::ffi::AnyBuffer key_out;
  xla::ffi::AnyBuffer value_out;
  xla::ffi::AnyBuffer query_descale;
  xla::ffi::AnyBuffer key_descale;
  xla::ffi::AnyBuffer value_descale;
};

StatusOr<ForwardProblem> decode_forward(const ForwardBuffers& buffers, const Options& options);
StatusOr<ForwardFloat8Problem> decode_forward_float8(const ForwardFloat8Buffers& buffers,
                                                     const Options& options,
                                                     bool value_is_prepared);
StatusOr<BackwardProblem> decode_backward(const BackwardBuffers& buffers, const Options& options);
StatusOr<QuantizeProblem> decode_quantize(const QuantizeBuffers& buffers,
                                          const QuantizeOptions& options);

}  // namespace jax_fa3
