// Kernels that a call brings along, linked with its functions (jax_fa3/flex/link.py): machine code
// in an attribute, which is loaded when a program is instantiated, once in a process.
#pragma once

#include <string_view>

#include "call/status.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fa3 {

// Both are empty where a call has no such kernel.
struct LinkedKernel {
  std::string_view key;   // the SHA-256 of the machine code, 64 hexadecimal digits
  std::string_view code;  // a cubin of one kernel, in base64

  bool is_there() const { return !key.empty() || !code.empty(); }
};

// Loads the kernel, unless one of its key is there already. Where there is no GPU it only checks
// the attribute: a program may be compiled for another machine.
Status load(const LinkedKernel& kernel);

// The runtime's handle of a kernel that has been loaded, for a launch; null without a key.
StatusOr<const void*> handle_of(std::string_view key);

}  // namespace jax_fa3

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::LinkedKernel,
                                      xla::ffi::StructMember<std::string_view>("key"),
                                      xla::ffi::StructMember<std::string_view>("code"));
