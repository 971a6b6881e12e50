"""NVIDIA's compiler and linker as libraries, NVRTC and nvJitLink, which come with jax[cuda13].

A kernel is shipped as LTO-IR that calls functions which are not there. NVRTC makes LTO-IR of a text
that defines them, and nvJitLink makes machine code of both, in which they are inlined. Both run on
the CPU and need no GPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ARCH = "sm_90a"
MAJOR = 13  # of the CUDA toolkit that made the kernels' LTO-IR: a linker of another cannot read it
LTOIR, FATBIN = 3, 4  # nvJitLinkInputType

# As the kernels are compiled: --use_fast_math.
_COMPILE = ("-ftz=true", "-prec-div=false", "-prec-sqrt=false", "-fmad=true")
_LINK = ("-ftz=1", "-prec-div=0", "-prec-sqrt=0", "-fma=1")


class Linked(NamedTuple):
    """What the linker makes, and what ptxas -v says of it."""

    code: bytes  # a cubin
    log: str


class Toolchain(NamedTuple):
    """The two libraries, and their versions, (major, minor)."""

    nvrtc: ctypes.CDLL
    nvjitlink: ctypes.CDLL
    nvrtc_version: tuple[int, int]
    nvjitlink_version: tuple[int, int]

    @property
    def identity(self) -> str:
        """What machine code depends on beside a kernel and a text."""
        return repr((ARCH, self.nvrtc_version, self.nvjitlink_version, _COMPILE, _LINK))

    def compile(self, text: str) -> bytes:
        """The LTO-IR of a CUDA C text. Raises RuntimeError with NVRTC's log."""
        program = ctypes.c_void_p()
        source = text.encode()
        _check(
            self.nvrtc.nvrtcCreateProgram(
                ctypes.byref(program), source, b"function.cu", 0, None, None
            ),
            "nvrtcCreateProgram",
        )
        try:
            options = (f"-arch={ARCH}", "-dlto", "-rdc=true", "-std=c++17", *_COMPILE)
            status = self.nvrtc.nvrtcCompileProgram(program, *_strings(options))
            if status:
                log = _sized(self.nvrtc, "nvrtcGetProgramLog", program)
                raise RuntimeError(
                    f"NVRTC cannot compile the text of a function:\n{_text(log)}\n{text}"
                )
            return _sized(self.nvrtc, "nvrtcGetLTOIR", program)
        finally:
            self.nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

    def link(self, kernel: bytes, function: bytes) -> Linked:
        """The machine code of a kernel's fatbin and a function's LTO-IR. Raises RuntimeError with
        nvJitLink's log."""
        linker = ctypes.c_void_p()
        options = (f"-arch={ARCH}", "-lto", "-verbose", "-Xptxas=-v", *_LINK)
        _check(self._linker("Create")(ctypes.byref(linker), *_strings(options)), "nvJitLinkCreate")
        try:
            for kind, name, data in ((FATBIN, b"kernel", kernel), (LTOIR, b"function", function)):
                size = ctypes.c_size_t(len(data))
                self._check_link(self._linker("AddData")(linker, kind, data, size, name), linker)
            self._check_link(self._linker("Complete")(linker), linker)
            logs = (_text(self._linked(linker, name)) for name in ("InfoLog", "ErrorLog"))
            return Linked(self._linked(linker, "LinkedCubin"), "\n".join(logs))
        finally:
            self._linker("Destroy")(ctypes.byref(linker))

    def _linker(self, name: str) -> Callable[..., int]:
        """A function of nvJitLink, whose symbols have the version in their names."""
        major, minor = self.nvjitlink_version
        for symbol in (f"__nvJitLink{name}_{major}_{minor}", f"nvJitLink{name}"):
            if hasattr(self.nvjitlink, symbol):
                return getattr(self.nvjitlink, symbol)
        raise RuntimeError(f"nvJitLink {major}.{minor} has no function nvJitLink{name}")

    def _linked(self, linker: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        _check(self._linker(f"Get{what}Size")(linker, ctypes.byref(size)), f"size of {what}")
        buffer = ctypes.create_string_buffer(size.value)
        _check(self._linker(f"Get{what}")(linker, buffer), what)
        return buffer.raw

    def _check_link(self, status: int, linker: ctypes.c_void_p) -> None:
        if status:
            log = _text(self._linked(linker, "ErrorLog"))
            raise RuntimeError(f"nvJitLink cannot link a function into a kernel ({status}):\n{log}")


@functools.cache
def find() -> Toolchain | str:
    """The libraries, or why there are none that work together."""
    nvrtc = _load("nvrtc")
    if isinstance(nvrtc, str):
        return nvrtc
    nvjitlink = _load("nvJitLink")
    if isinstance(nvjitlink, str):
        return nvjitlink
    version = [ctypes.c_int(), ctypes.c_int()]
    nvrtc.nvrtcVersion(*map(ctypes.byref, version))
    nvrtc_version = version[0].value, version[1].value
    unsigned = [ctypes.c_uint(), ctypes.c_uint()]
    nvjitlink.nvJitLinkVersion(*map(ctypes.byref, unsigned))
    linker_version = unsigned[0].value, unsigned[1].value
    return _why_not(nvrtc_version, linker_version) or Toolchain(
        nvrtc, nvjitlink, nvrtc_version, linker_version
    )


def _why_not(nvrtc: tuple[int, int], nvjitlink: tuple[int, int]) -> str | None:
    """Why versions of the libraries do not work together: LTO-IR may be as new as its linker."""
    if nvjitlink[0] != MAJOR:
        return f"nvJitLink is of CUDA {nvjitlink[0]}.{nvjitlink[1]}, expected {MAJOR}"
    if nvrtc > nvjitlink:
        return (
            f"NVRTC {nvrtc[0]}.{nvrtc[1]} is newer than nvJitLink {nvjitlink[0]}.{nvjitlink[1]}, "
            "which cannot link what it compiles; install the same version of both"
        )
    return None


def _load(name: str) -> ctypes.CDLL | str:
    """A library, from JAX's wheels, a CUDA toolkit or where the loader looks."""
    for path in _places(name):
        try:
            # NVRTC looks for a part of its own where the loader does, and not beside itself.
            for part in sorted(Path(path).parent.glob(f"lib{name}-builtins.so.*")):
                ctypes.CDLL(str(part))
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    return f"there is no lib{name}.so.{MAJOR}; it comes with jax[cuda13]"


def _places(name: str) -> Iterator[Path | str]:
    wheels = importlib.util.find_spec("nvidia")
    folders = (wheels and wheels.submodule_search_locations) or ()
    roots = [f"{folder}/cu{MAJOR}" for folder in folders]
    roots += [os.environ.get("CUDA_HOME", "/usr/local/cuda")]
    for root in roots:
        for folder in ("lib", "lib64"):
            path = Path(root, folder, f"lib{name}.so.{MAJOR}")
            if path.exists():
                yield path
    yield f"lib{name}.so.{MAJOR}"


def _strings(options: tuple[str, ...]) -> tuple[int, ctypes.Array]:
    return len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options))


def _sized(library: ctypes.CDLL, name: str, program: ctypes.c_void_p) -> bytes:
    """What a pair of NVRTC's functions, of the size and of the bytes, gives."""
    size = ctypes.c_size_t()
    _check(getattr(library, f"{name}Size")(program, ctypes.byref(size)), f"{name}Size")
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, name)(program, buffer), name)
    return buffer.raw


def _text(log: bytes) -> str:
    return log.rstrip(b"\0").decode(errors="replace").strip()


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what} failed with status {status}")
