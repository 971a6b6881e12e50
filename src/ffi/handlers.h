// The XLA handlers that module.cc hands to Python.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" XLA_FFI_Error* jax_fa3_forward(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* jax_fa3_backward(XLA_FFI_CallFrame* call_frame);
