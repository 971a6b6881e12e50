# Kernels that call functions of the user's: LTO-IR in fatbins, jax_fa3/flex/kernels/<name>.fatbin,
# which jax_fa3/flex/link.py links with the functions. By commands of our own: CMake's rules would
# have them in object files. JAX_FA3_LINKABLE (kernels.cmake) lists them.
set(JAX_FA3_LINKABLE_DIR "${PROJECT_BINARY_DIR}/linkable")
set(_flags -DNDEBUG -DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED -O3 -std=c++17
  --use_fast_math --expt-relaxed-constexpr --expt-extended-lambda
  -rdc=true -gencode arch=compute_90a,code=lto_90a -fatbin
  -I "${PROJECT_SOURCE_DIR}/src" -isystem "${CUTLASS_INCLUDE_DIR}")
foreach(include IN LISTS JAX_FA3_CUDA_INCLUDE_DIRS)
  list(APPEND _flags -isystem "${include}")
endforeach()

set(_outputs)
foreach(entry IN LISTS JAX_FA3_LINKABLE)
  string(REPLACE "|" ";" entry "${entry}")
  list(GET entry 0 kernel)
  list(GET entry 1 name)
  list(GET entry 2 config)
  set(_source "${JAX_FA3_GENERATED_DIR}/linkable/${name}.cu")
  set(_output "${JAX_FA3_LINKABLE_DIR}/${name}.fatbin")
  configure_file("${PROJECT_SOURCE_DIR}/cmake/linkable_${kernel}.cu.in" "${_source}" @ONLY)
  add_custom_command(OUTPUT "${_output}"
    COMMAND "${CMAKE_COMMAND}" -E make_directory "${JAX_FA3_LINKABLE_DIR}"
    COMMAND "${CMAKE_CUDA_COMPILER}" ${_flags} -MD -MF "${_output}.d" -MT "${_output}"
      -x cu "${_source}" -o "${_output}"
    DEPENDS "${_source}" DEPFILE "${_output}.d" JOB_POOL kernels VERBATIM
    COMMENT "Building ${name}.fatbin")
  list(APPEND _outputs "${_output}")
endforeach()
add_custom_target(jax_fa3_linkable ALL DEPENDS ${_outputs})
install(FILES ${_outputs} DESTINATION jax_fa3/flex/kernels COMPONENT python)
