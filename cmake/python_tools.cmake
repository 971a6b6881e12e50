# Python for the module, and where the build requirements are that come as Python packages. They are
# located without importing them.
set(JAX_FA3_TOOLS_PYTHON "" CACHE FILEPATH
  "Interpreter whose packages hold nanobind, CUTLASS and the XLA FFI headers (default: Python)")

find_package(Python 3.11 REQUIRED
  COMPONENTS Interpreter Development.Module
  OPTIONAL_COMPONENTS Development.SABIModule)
if(NOT JAX_FA3_TOOLS_PYTHON)
  set(JAX_FA3_TOOLS_PYTHON "${Python_EXECUTABLE}")
endif()

# Sets `out` to <folder of package>/<path>, or to "" when there is no such file.
function(jax_fa3_locate out package path)
  execute_process(
    COMMAND "${JAX_FA3_TOOLS_PYTHON}" -c
      "import importlib.util, os, sys
spec = importlib.util.find_spec(sys.argv[1])
for folder in (spec.submodule_search_locations if spec else []):
    found = os.path.join(folder, sys.argv[2])
    if os.path.exists(found):
        print(found)
        break"
      "${package}" "${path}"
    OUTPUT_VARIABLE _found OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(${out} "${_found}" PARENT_SCOPE)
endfunction()
