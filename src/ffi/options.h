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
  float softcap;              // of the logits; 0 when off
  std::int32_t sm_margin;     // streaming multiprocessors to leave free
  bool deterministic;
  bool has_query_lengths;
  bool has_key_lengths;
  bool has_query_offset;
  bool has_visibility;
  bool has_bias;
  bool has_dense_mask;
  bool has_sinks;
  bool has_alibi_slopes;
  bool has_dlse;        // backward only
  bool has_dbias;       // backward only: its gradient is wanted
  bool has_max_logits;  // forward only: they are wanted
  bool has_dsinks;      // backward only: their gradient is wanted
};

// The attributes of a call in 16 bits.
struct CallAttributes {
  Options options;
};

// A kernel is for one variant.
inline Status check_variant(const Options& options) {
  const bool has_dense = options.has_bias || options.has_dense_mask;
  const int variants = has_dense + (options.softcap > 0) + options.has_alibi_slopes;
  if (variants <= 1) return {};
  return unimplemented("no kernel has two of a dense array, softcap and alibi_slopes");
}

inline Status check_forward(const Options& options) {
  if (options.has_dlse) return invalid_argument("has_dlse must be false in the forward pass");
  if (options.has_dbias) return invalid_argument("has_dbias must be false in the forward pass");
  if (options.has_dsinks) return invalid_argument("has_dsinks must be false in the forward pass");
  return check_variant(options);
}

inline Status check_backward(const Options& options) {
  if (options.has_max_logits) {
    return invalid_argument("has_max_logits must be false in the backward pass");
  }
  if (options.has_dbias && !options.has_bias) {
    return invalid_argument("has_bias must be true with has_dbias");
  }
  if (options.has_dsinks && !options.has_sinks) {
    return invalid_argument("has_sinks must be true with has_dsinks");
  }
  return check_variant(options);
}

// What a call's options and extents say of its problem.
inline void fill_call(const Options& options, const Extents& extents, CallProblem& problem) {
  problem.mask = {options.window_left, options.window_right, options.query_offset};
  problem.softmax_scale = options.scale;
  problem.softcap = options.softcap;
  problem.presence.visibility = options.has_visibility;
  problem.presence.any = options.has_visibility || options.has_query_lengths ||
                         options.has_key_lengths || options.has_query_offset ||
                         options.has_dense_mask;
  problem.presence.variant = options.has_bias           ? Variant::kBias
                             : options.has_dense_mask   ? Variant::kMask
                             : options.softcap > 0      ? Variant::kSoftcap
                             : options.has_alibi_slopes ? Variant::kAlibi
                                                        : Variant::kPlain;
  if (options.has_visibility) {
    const std::int64_t words = extents['v'], heads = extents['y'];
    problem.index.visibility_batch_stride = extents['x'] > 1 ? heads * words : 0;
    problem.index.visibility_head_stride = heads > 1 ? words : 0;
  }
  if (options.has_bias) problem.dense.bias_shape = {extents['f'], extents['g'], extents['q']};
  if (options.has_sinks) problem.sinks.planes = extents['a'];
  if (options.has_alibi_slopes) problem.alibi_slopes.planes = extents['l'];
  if (options.has_dense_mask) {
    problem.dense.mask_shape = {extents['i'], extents['j'], extents.mask_rows()};
  }
}

}  // namespace jax_fa3

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_fa3::Options, xla::ffi::StructMember<float>("scale"),
    xla::ffi::StructMember<std::int32_t>("window_left"),
    xla::ffi::StructMember<std::int32_t>("window_right"),
    xla::ffi::StructMember<std::int32_t>("query_offset"),
    xla::ffi::StructMember<float>("rescale_threshold"), xla::ffi::StructMember<float>("softcap"),
    xla::ffi::StructMember<std::int32_t>("sm_margin"),
    xla::ffi::StructMember<bool>("deterministic"),
    xla::ffi::StructMember<bool>("has_query_lengths"),
    xla::ffi::StructMember<bool>("has_key_lengths"),
    xla::ffi::StructMember<bool>("has_query_offset"),
    xla::ffi::StructMember<bool>("has_visibility"), xla::ffi::StructMember<bool>("has_bias"),
    xla::ffi::StructMember<bool>("has_dense_mask"), xla::ffi::StructMember<bool>("has_sinks"),
    xla::ffi::StructMember<bool>("has_alibi_slopes"), xla::ffi::StructMember<bool>("has_dlse"),
    xla::ffi::StructMember<bool>("has_dbias"), xla::ffi::StructMember<bool>("has_max_logits"),
    xla::ffi::StructMember<bool>("has_dsinks"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::CallAttributes,
                                      xla::ffi::StructMember<jax_fa3::Options>("options"));
