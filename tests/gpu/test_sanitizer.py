"""compute-sanitizer's memcheck over a few calls.

JAX_FA3_SANITIZER=0 leaves it out; JAX_FA3_SANITIZER=memcheck,racecheck names the tools to run.
"""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("sanitizer_case.py")
TOOLS = os.environ.get("JAX_FA3_SANITIZER", "memcheck")
TIME_LIMIT_S = 150  # many times what a tool takes: a kernel that hangs under it fails


def compute_sanitizer():
    """Its path: on PATH, in a CUDA toolkit, or in the nvidia-cuda-sanitizer-api wheel; or None."""
    wheels = importlib.util.find_spec("nvidia")
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    folders += [
        f"{root}/cu13/bin" for root in (wheels.submodule_search_locations if wheels else ())
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


@pytest.mark.skipif(TOOLS == "0", reason="JAX_FA3_SANITIZER=0")
@pytest.mark.skipif(compute_sanitizer() is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", TOOLS.split(","))
def test_sanitizer_is_silent(tool):
    command = [
        *("timeout", str(TIME_LIMIT_S)),
        compute_sanitizer(),
        "--tool",
        tool,
        "--error-exitcode",
        "99",
        "--report-api-errors",
        "no",
        "--kernel-name",
        "kns=jax_fa3",
        "--target-processes",
        "all",
        sys.executable,
        str(SCRIPT),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    output = result.stdout + result.stderr
    report = "\n".join(line[:200] for line in output.splitlines()[:60])
    assert result.returncode == 0, report
    assert "ERROR SUMMARY: 0 errors" in output or "RACECHECK SUMMARY: 0 hazards" in output, report
