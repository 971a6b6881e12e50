// Every static choice of a call of attention: decoded from the dictionary attribute "options",
// checked, and brought to its place in the problem. The fields mirror one to one what `attributes`
// in jax_fa3/ffi.py gives; XLA refuses a missing or extra field and a wrong width.
#pragma once

#include <cmath>
#include <cstdint>

#include "call/problem.h"
#include "call/shape.h"
#include "call/status.h"
#include "call/text.h"
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
};

// The attributes of a call of attention.
struct CallAttributes {
  Names operands;
  Names results;
  Options options;
};

// Which values are legal. Python has checked the same with better words; this holds for calls that
// come another way.
inline Status check_options(const Options& options) {
  JFA_CHECK_OK(check_mask({options.window_left, options.window_right, options.query_offset}));
  if (!(options.softcap >= 0 && std::isfinite(options.softcap))) {
    return invalid_argument(
        concat("softcap must be non-negative and finite, got ", options.softcap));
  }
  if (options.scale > 0 && std::isfinite(options.scale)) return {};
  return invalid_argument(concat("scale must be positive and finite, got ", options.scale));
}

// Of a call in 16 bits: a kernel is for one variant.
inline Status check_call(const CallAttributes& a) {
  JFA_CHECK_OK(check_options(a.options));
  const bool has_dense = a.operands.has(operands::kBias) || a.operands.has(operands::kDenseMask);
  const bool has_slopes = a.operands.has(operands::kAlibiSlopes);
  if (has_dense + (a.options.softcap > 0) + has_slopes <= 1) return {};
  return unimplemented("no kernel has two of a dense array, softcap and alibi_slopes");
}

// What no array says of a call's problem by itself.
inline void fill_call(const Options& options, const Extents& extents, CallProblem& problem) {
  problem.mask = {options.window_left, options.window_right, options.query_offset};
  problem.softmax_scale = options.scale;
  problem.softcap = options.softcap;
  if (options.softcap > 0) problem.presence.variant = Variant::kSoftcap;
  if (problem.dense.mask != nullptr) problem.dense.mask_shape.rows = extents.mask_rows();
}

}  // namespace jax_fa3

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::Options, xla::ffi::StructMember<float>("scale"),
                                      xla::ffi::StructMember<std::int32_t>("window_left"),
                                      xla::ffi::StructMember<std::int32_t>("window_right"),
                                      xla::ffi::StructMember<std::int32_t>("query_offset"),
                                      xla::ffi::StructMember<float>("rescale_threshold"),
                                      xla::ffi::StructMember<float>("softcap"),
                                      xla::ffi::StructMember<std::int32_t>("sm_margin"),
                                      xla::ffi::StructMember<bool>("deterministic"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::CallAttributes,
                                      xla::ffi::StructMember<jax_fa3::Names>("operands"),
                                      xla::ffi::StructMember<jax_fa3::Names>("results"),
                                      xla::ffi::StructMember<jax_fa3::Options>("options"));
