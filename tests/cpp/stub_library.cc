// A handler that does nothing, for programs that are compiled and never run.
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    stub, [] { return ffi::Error::Success(); }, ffi::Ffi::Bind());
