"""NVRTC by ctypes, where it is installed: with the CUDA toolkit or by a package of its own."""

import ctypes
import functools
import importlib.util
import pathlib

import pytest


def _folders():
    try:
        found = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        found = None
    packages = [pathlib.Path(x) / "lib" for x in found.submodule_search_locations] if found else []
    return [*packages, pathlib.Path("/usr/local/cuda/lib64")]


@functools.cache
def library():
    """The library, or None; libnvrtc-builtins must be found beside it."""
    for folder in _folders():
        for path in sorted(folder.glob("libnvrtc.so.1[3-9]*"))[:1]:
            for builtins in folder.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(path))
    return None


needs_nvrtc = pytest.mark.skipif(library() is None, reason="no NVRTC 13 on this machine")


def compiled(text, kind):
    """The PTX or LTOIR, bytes, of a text for sm_90a; raises what the compiler says."""
    nvrtc, program, size = library(), ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"flex.cu", 0, None, None)
    options = [b"-arch=sm_90a", b"-rdc=true", *([b"-dlto"] if kind == "LTOIR" else [])]
    # A comparison of an unsigned number with 0, of the user's, and what nothing calls.
    options += [b"-diag-suppress=186,177"]
    failed = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*options)
    )

    def read(what):
        assert not getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        assert not getattr(nvrtc, f"nvrtcGet{what}")(program, data)
        return data.raw

    log = read("ProgramLog").decode().strip("\0\n ")
    assert not failed, log
    assert not log, log
    result = read(kind)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return result
