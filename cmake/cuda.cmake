# The CUDA compiler: -DCMAKE_CUDA_COMPILER, $CUDACXX, $CUDA_HOME, nvcc on PATH, or the pinned PyPI
# wheels (requirements/cuda.txt). Enables the language and sets
#   JAX_FA3_CUDA_INCLUDE_DIRS   toolkit headers, with CUDA 13's cccl folder
#   JAX_FA3_CUDART              the static runtime
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(JAX_FA3_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
  if(NOT JAX_FA3_NVCC)
    jax_fa3_locate(_wheel_nvcc nvidia cu13/bin/nvcc)
    set(JAX_FA3_NVCC "${_wheel_nvcc}")
  endif()
  if(NOT JAX_FA3_NVCC)
    message(FATAL_ERROR "No nvcc: install CUDA 13, or the compiler wheels "
      "(pip install -r requirements/cuda.txt), or build without kernels (JAX_FA3_CUDA=OFF)")
  endif()
  set(CMAKE_CUDA_COMPILER "${JAX_FA3_NVCC}" CACHE FILEPATH "CUDA compiler" FORCE)
endif()

# The toolkit's root as nvcc itself sees it: right for wrapper scripts, links and the wheels.
set(_nvcc "${CMAKE_CUDA_COMPILER}")
if(NOT _nvcc)
  set(_nvcc "$ENV{CUDACXX}")
endif()
execute_process(COMMAND "${_nvcc}" -dryrun -E -x cu /dev/null
  OUTPUT_VARIABLE _dryrun ERROR_VARIABLE _dryrun)
if(NOT _dryrun MATCHES "#\\$ TOP=([^\n]+)")
  message(FATAL_ERROR "Cannot read the toolkit's root from '${_nvcc} -dryrun': ${_dryrun}")
endif()
get_filename_component(_cuda_root "${CMAKE_MATCH_1}" REALPATH)
if(NOT EXISTS "${_cuda_root}/lib64")
  string(APPEND CMAKE_CUDA_FLAGS_INIT " -L${_cuda_root}/lib")  # the wheels' layout, unknown to nvcc
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 90a-real)
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 13.0)
  message(FATAL_ERROR "CUDA 13.0 or newer is needed, got ${CMAKE_CUDA_COMPILER_VERSION} (${_nvcc})")
endif()

set(JAX_FA3_CUDA_INCLUDE_DIRS "${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES}")
foreach(_folder IN LISTS CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES)
  if(EXISTS "${_folder}/cccl")
    list(APPEND JAX_FA3_CUDA_INCLUDE_DIRS "${_folder}/cccl")
  endif()
endforeach()
find_library(JAX_FA3_CUDART cudart_static REQUIRED NO_DEFAULT_PATH
  HINTS "${_cuda_root}/lib" "${_cuda_root}/lib64" "${_cuda_root}/targets/x86_64-linux/lib")

# One kernel unit takes up to 5 GB: as many at a time as memory allows.
cmake_host_system_information(RESULT _memory_mb QUERY TOTAL_PHYSICAL_MEMORY)
cmake_host_system_information(RESULT _cores QUERY NUMBER_OF_LOGICAL_CORES)
math(EXPR _kernel_jobs "(${_memory_mb} + 5119) / 6144")
if(_kernel_jobs GREATER _cores)
  set(_kernel_jobs ${_cores})
endif()
set_property(GLOBAL PROPERTY JOB_POOLS "kernels=${_kernel_jobs}")
message(STATUS "nvcc ${CMAKE_CUDA_COMPILER_VERSION} in ${_cuda_root}, ${_kernel_jobs} kernel units at a time")
