// Every static choice of a call, decoded from the dictionary attribute "options". The fields mirror
// one to one what `attributes` in jax_fa3/ffi.py gives; XLA refuses a missing or extra field and a
// wrong width, validate.cc a wrong value.
#pragma once

#include <cstdint>

#include "call/problem.h"
#include "call/status.h"
#include "ffi/decode.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fa3 {

struct Options {
  float scale;                // of the logits, > 0
  std::int32_t window_left;   // columns, inclusive; kUnbounded when off
  std::int32_t window_right;  // columns, inclusive; kUnbounded when off
  std::int32_t query_offset;  // used without the offset array
  float rescale_threshold;    // log2 units
  std::int32_t sm_margin;     // streaming multiprocessors to leave free
  bool deterministic;
  bool has_query_lengths;
  bool has_key_lengths;
  bool has_query_offset;
  bool has_visibility;
  bool has_bias;
  bool has_dense_mask;
  bool has_dlse;   // backward only
  bool has_dbias;  // backward only: its gradient is wanted
};

// The attributes of a call in 16 bits.
struct CallAttributes {
  Options options;
};

inline Status check_forward(const Options& options) {
  if (options.has_dlse) return invalid_argument("has_dlse must be false in the forward pass");
  if (options.has_dbias) return invalid_argument("has_dbias must be false in the forward pass");
  return {};
}

// What a call's options and extents say of its problem.
inline void fill_call(const Options& options, const Extents& extents, CallProblem& problem) {
  problem.mask = {options.window_left, options.window_right, options.query_offset};
  problem.softmax_scale = options.scale;
  problem.presence.visibility = options.has_visibility;
  problem.presence.any = options.has_visibility || options.has_query_lengths ||
                         options.has_key_lengths || options.has_query_offset ||
                         options.has_dense_mask;
  problem.presence.dense = options.has_bias         ? Dense::kBias
                           : options.has_dense_mask ? Dense::kMask
                                                    : Dense::kNone;
  if (options.has_visibility) {
    const std::int64_t words = extents['v'], heads = extents['y'];
    problem.index.visibility_batch_stride = extents['x'] > 1 ? heads * words : 0;
    problem.index.visibility_head_stride = heads > 1 ? words : 0;
  }
  if (options.has_bias) problem.dense.bias_shape = {extents['f'], extents['g'], extents['q']};
  if (options.has_dense_mask) {
    problem.dense.mask_shape = {extents['i'], extents['j'], extents.mask_rows()};
  }
}

}  // namespace jax_fa3

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::Options, xla::ffi::StructMember<float>("scale"),
                                      xla::ffi::StructMember<std::int32_t>("window_left"),
                                      xla::ffi::StructMember<std::int32_t>("window_right"),
                                      xla::ffi::StructMember<std::int32_t>("query_offset"),
                                      xla::ffi::StructMember<float>("rescale_threshold"),
                                      xla::ffi::StructMember<std::int32_t>("sm_margin"),
                                      xla::ffi::StructMember<bool>("deterministic"),
                                      xla::ffi::StructMember<bool>("has_query_lengths"),
                                      xla::ffi::StructMember<bool>("has_key_lengths"),
                                      xla::ffi::StructMember<bool>("has_query_offset"),
                                      xla::ffi::StructMember<bool>("has_visibility"),
                                      xla::ffi::StructMember<bool>("has_bias"),
                                      xla::ffi::StructMember<bool>("has_dense_mask"),
                                      xla::ffi::StructMember<bool>("has_dlse"),
                                      xla::ffi::StructMember<bool>("has_dbias"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::CallAttributes,
                                      xla::ffi::StructMember<jax_fa3::Options>("options"));
