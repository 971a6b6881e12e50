"""compute-sanitizer's memcheck over a few calls.

JAX_FA3_SANITIZER=0 leaves it out; JAX_FA3_SANITIZER=memcheck,racecheck names the tools to run.
"""

import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import pytest

SCRIPT = pathlib.Path(__file__).with_name("sanitizer_case.py")
TOOLS = os.environ.get("JAX_FA3_SANITIZER", "memcheck")
SILENCE_LIMIT_S = 150  # many times what a case takes, which prints its name: a hang fails


def compute_sanitizer():
    """Its path: on PATH, in a CUDA toolkit, or in the nvidia-cuda-sanitizer-api wheel; or None."""
    wheels = importlib.util.find_spec("nvidia")
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    folders += [
        f"{root}/cu13/bin" for root in (wheels.submodule_search_locations if wheels else ())
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run(command):
    """Its exit status and what it printed. One that falls silent is ended, with its children."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    lines, is_silent = [], threading.Event()

    def end():
        is_silent.set()
        os.killpg(process.pid, signal.SIGKILL)

    while True:
        watch = threading.Timer(SILENCE_LIMIT_S, end)
        watch.start()
        line = process.stdout.readline()
        watch.cancel()
        if not line:
            break
        lines.append(line)
    if is_silent.is_set():
        lines.append(f"nothing printed for {SILENCE_LIMIT_S} s")
    return process.wait(), "".join(lines)


@pytest.mark.skipif(TOOLS == "0", reason="JAX_FA3_SANITIZER=0")
@pytest.mark.skipif(compute_sanitizer() is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("part", ("plain", "packed", "dense", "scores", "caches", "float8"))
@pytest.mark.parametrize("tool", TOOLS.split(","))
def test_sanitizer_is_silent(tool, part):
    command = [
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
        part,
    ]
    status, output = run(command)
    lines = [line[:200] for line in output.splitlines()]
    report = "\n".join(lines if len(lines) < 60 else lines[:40] + lines[-20:])
    assert status == 0, report
    assert "ERROR SUMMARY: 0 errors" in output or "RACECHECK SUMMARY: 0 hazards" in output, report
