// The XLA handlers that module.cc hands to Python.
#pragma once

extern "C" {

struct XLA_FFI_Error;
struct XLA_FFI_CallFrame;

XLA_FFI_Error* jax_fa3_forward(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_fa3_forward_float8(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_fa3_backward(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_fa3_quantize(XLA_FFI_CallFrame* call_frame);

}  // extern "C"
