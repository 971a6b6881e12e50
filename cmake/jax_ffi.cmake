# Target `jax_ffi`: the XLA FFI headers, as SYSTEM includes. A runtime refuses handlers built with
# headers newer than itself, so they come from the oldest supported jaxlib.
jax_fa3_locate(_jax_ffi jaxlib include)
set(XLA_FFI_INCLUDE_DIR "${_jax_ffi}" CACHE PATH "Folder that holds xla/ffi/api/ffi.h")
if(NOT EXISTS "${XLA_FFI_INCLUDE_DIR}/xla/ffi/api/ffi.h")
  message(FATAL_ERROR "No XLA FFI headers in '${XLA_FFI_INCLUDE_DIR}': install requirements/headers.txt "
    "(pip install --no-deps -r requirements/headers.txt) or set XLA_FFI_INCLUDE_DIR")
endif()
file(STRINGS "${XLA_FFI_INCLUDE_DIR}/xla/ffi/api/c_api.h" _ffi_minor REGEX "define XLA_FFI_API_MINOR")
if(NOT _ffi_minor MATCHES " 3$")
  message(WARNING "XLA FFI headers in ${XLA_FFI_INCLUDE_DIR} are not those of jaxlib 0.10.2 (API 0.3); "
    "the module will not register with an older JAX")
endif()
add_library(jax_ffi INTERFACE)
target_include_directories(jax_ffi SYSTEM INTERFACE "${XLA_FFI_INCLUDE_DIR}")
