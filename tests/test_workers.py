"""The set-up of workers of pytest-xdist."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
TEST = """
from pathlib import Path

def test_environment_at_the_start():
    assert b"OPENBLAS_NUM_THREADS=1" in Path("/proc/self/environ").read_bytes().split(bytes(1))
"""


@pytest.mark.parametrize("required", ("", "1"))
def test_workers_start_with_one_blas_thread(tmp_path, required):
    """OpenBLAS looks only once, when it is loaded, which a plugin may do before conftest.py."""
    pytest.importorskip("xdist")
    for file in (CONFTEST, CONFTEST.with_name("gpu_in_turn.py")):
        shutil.copy(file, tmp_path)
    (tmp_path / "test_it.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", tmp_path]
    unset = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    kept = {k: v for k, v in os.environ.items() if k not in unset and "PYTEST" not in k}
    environment = kept | {"JAX_FA3_REQUIRE_GPU": required}
    done = subprocess.run(
        command, cwd=CONFTEST.parents[1], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
