// The XLA handlers that module.cc hands to Python, one for each custom call; of those that bring
// kernels along one more, of a program's instantiation.
#pragma once

#define JFA_CUSTOM_CALLS(X) \
  X(jax_fa3_forward)        \
  X(jax_fa3_forward_float8) \
  X(jax_fa3_backward)       \
  X(jax_fa3_quantize)       \
  X(jax_fa3_visibility)     \
  X(jax_fa3_dense_mask)     \
  X(jax_fa3_forward_cached) \
  X(jax_fa3_append)
#define JFA_LINKED_CALLS(X) \
  X(jax_fa3_flex_forward)   \
  X(jax_fa3_flex_backward)

extern "C" {

struct XLA_FFI_Error;
struct XLA_FFI_CallFrame;

#define JFA_DECLARE(name) XLA_FFI_Error* name(XLA_FFI_CallFrame* call_frame);
JFA_CUSTOM_CALLS(JFA_DECLARE)
JFA_LINKED_CALLS(JFA_DECLARE)
#undef JFA_DECLARE
#define JFA_DECLARE(name) XLA_FFI_Error* name##_instantiate(XLA_FFI_CallFrame* call_frame);
JFA_LINKED_CALLS(JFA_DECLARE)
#undef JFA_DECLARE

}  // extern "C"
