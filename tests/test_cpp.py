"""Host C++ tests: planning, mask geometry, decoding. Compiled here with the system's compiler."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX", "c++")
PLANS = [
    "src/call/shape.cc",
    "src/kernels/forward/schedule.cc",
    "src/kernels/forward/plan.cc",
    "src/kernels/forward_float8/plan.cc",
    "src/kernels/forward_cached/plan.cc",
    "src/kernels/backward/plan.cc",
]
DECODING = [
    "src/call/shape.cc",
    "src/kernels/quantize/quantize.cc",
    "src/kernels/visibility/visibility.cc",
    "src/kernels/dense_mask/dense_mask.cc",
    "src/kernels/append/append.cc",
    "src/ffi/decode.cc",
    "src/ffi/validate.cc",
]
SOURCES = {
    "plan": PLANS,
    "mask": [],
    "dense_mask": [],
    "prepared_value": [],
    "rotation": [],
    "splits": [],
    "decode": DECODING,
}


def ffi_headers() -> str:
    """The XLA FFI headers of the installed jaxlib, located without importing it."""
    spec = importlib.util.find_spec("jaxlib")
    return os.path.join(spec.submodule_search_locations[0], "include")


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler ({COMPILER})")
@pytest.mark.parametrize("name", SOURCES)
def test_host_cpp(name: str, tmp_path: Path):
    program = tmp_path / name
    sources = [f"tests/cpp/{name}_test.cc", *SOURCES[name]]
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Isrc", "-isystem", ffi_headers()]
    compiled = subprocess.run(
        [COMPILER, *flags, *sources, "-o", program], cwd=ROOT, capture_output=True, text=True
    )
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
