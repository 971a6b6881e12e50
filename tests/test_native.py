"""What is said where the extension module is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import jax, jax_fa3
x = jax.ShapeDtypeStruct((1, 8, 1, 64), "bfloat16")
print(jax_fa3.is_supported(x, x, x))
jax_fa3.doctor()
"""


@pytest.mark.parametrize("installed", [False, True])
def test_source_folder_without_module(tmp_path, installed):
    source, site = tmp_path / "source", tmp_path / "site"
    ignore = shutil.ignore_patterns("_C.*so", "__pycache__")
    shutil.copytree(ROOT / "jax_fa3", source / "jax_fa3", ignore=ignore)
    (source / "CMakeLists.txt").touch()
    if installed:
        info = site / "jax_fa3-0.1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: jax_fa3\nVersion: 0.1.0\n")
        (info / "RECORD").write_text("jax_fa3/_C.abi3.so,,\n")
        (site / "jax_fa3").mkdir()
        (site / "jax_fa3/_C.abi3.so").touch()
    path = os.pathsep.join([str(source), str(site)])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT]
    answer = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert answer.stdout.count(f"there is no extension module _C in {source}/jax_fa3") == 2
    assert "make inplace" in answer.stdout and "circular" not in answer.stdout
    assert ("start Python in another folder" in answer.stdout) == installed
