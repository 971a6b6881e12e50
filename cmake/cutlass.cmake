# Target `cutlass`: the headers of the pinned nvidia-cutlass package, as SYSTEM includes.
jax_fa3_locate(_cutlass cutlass_library source/include)
set(CUTLASS_INCLUDE_DIR "${_cutlass}" CACHE PATH "Folder that holds cutlass/cutlass.h")
if(NOT EXISTS "${CUTLASS_INCLUDE_DIR}/cutlass/cutlass.h")
  message(FATAL_ERROR "No CUTLASS headers in '${CUTLASS_INCLUDE_DIR}': install requirements/headers.txt "
    "(pip install --no-deps -r requirements/headers.txt) or set CUTLASS_INCLUDE_DIR")
endif()
add_library(cutlass INTERFACE)
target_include_directories(cutlass SYSTEM INTERFACE "${CUTLASS_INCLUDE_DIR}")
target_compile_definitions(cutlass INTERFACE CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED)
