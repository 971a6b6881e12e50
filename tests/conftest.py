"""Session set-up: eight CPU devices and no GPU suite, or, with JAX_FA3_REQUIRE_GPU=1 (which `make
gpu-test` sets), the platform that JAX finds.

The variables must be set before JAX is first imported, hence here.
"""

import os
import sys

import pytest

import gpu_in_turn


def add_xla_flag(flag):
    """Before the flags that are set, which win."""
    os.environ["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}".strip()


if not os.environ.get("JAX_FA3_REQUIRE_GPU"):
    collect_ignore = ["gpu"]
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.append(os.path.join(sys.prefix, "cuda"))  # the compiler for GPUs: see Makefile
    add_xla_flag("--xla_force_host_platform_device_count=8")
    # The suite's time is that of LLVM, for thousands of small programs, most of which run once.
    add_xla_flag("--xla_backend_optimization_level=0")
elif worker := os.environ.get("PYTEST_XDIST_WORKER"):  # "gw" and a number
    gpu_in_turn.take_gpu(int(worker[2:]))
    # As many workers as cores: a compiler that takes all cores for itself starves the others, and
    # what runs under compute-sanitizer most of all.
    add_xla_flag("--xla_gpu_force_compilation_parallelism=1")


def pytest_configure(config):
    """One BLAS thread for each worker of pytest-xdist. They inherit it, for in a worker it may be
    too late: a plugin of pytest (jaxtyping's is one) imports NumPy before this file, and OpenBLAS
    counts its threads then, which wait for each other by spinning."""
    if getattr(config.option, "numprocesses", None):
        for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")


@pytest.fixture(scope="module")
def forward_kernel_alone():
    """Few query rows too take the forward kernel, and not that of caches, in whatever is traced
    here."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax_fa3.cached.few_rows.MOST_ROWS", 0)
        jax.clear_caches()
        yield
    jax.clear_caches()


def pytest_report_header():
    if not os.environ.get("JAX_FA3_REQUIRE_GPU"):
        return "tests/gpu: left out, JAX_FA3_REQUIRE_GPU is not set"


@pytest.fixture(autouse=True, scope="session")
def scores_at_once():
    """Calls through XLA of more than 1024 keys run in blocks, as large ones do, however few scores
    they have; the value is the usual limit."""
    from jax_fa3 import xla

    usual, xla.SCORES_AT_ONCE = xla.SCORES_AT_ONCE, 0
    yield usual
    xla.SCORES_AT_ONCE = usual
