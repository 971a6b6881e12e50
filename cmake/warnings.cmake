# Target `warnings`: what every host-compiled file of ours is held to. Not -Wpedantic, with which GCC
# rejects the XLA FFI headers even as SYSTEM includes.
option(JAX_FA3_WERROR "Treat warnings of host code as errors" OFF)
add_library(warnings INTERFACE)
target_compile_options(warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra $<$<BOOL:${JAX_FA3_WERROR}>:-Werror>>)
