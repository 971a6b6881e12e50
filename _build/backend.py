"""PEP 517 backend: scikit-build-core, plus what only a build with kernels needs.

Builds with kernels (the default) also get the pinned headers, and the pinned CUDA compiler where
the machine has none; a build with JAX_FA3_CUDA=OFF downloads neither.
"""

import os
import re
import shutil
from pathlib import Path

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403  (the hooks that stay as they are)

_REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"


def _pinned(name: str) -> list[str]:
    lines = (_REQUIREMENTS / name).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _with_kernels(config_settings: dict | None) -> bool:
    settings = {
        key.removeprefix("cmake.define."): str(value)
        for key, value in (config_settings or {}).items()
    }
    for variable in ("CMAKE_ARGS", "SKBUILD_CMAKE_ARGS", "SKBUILD_CMAKE_DEFINE"):
        for value in re.findall(r"JAX_FA3_CUDA(?::\w+)?=(\w+)", os.environ.get(variable, "")):
            settings.setdefault("JAX_FA3_CUDA", value)
    return settings.get("JAX_FA3_CUDA", "ON").upper() not in ("OFF", "0", "FALSE", "NO")


def _kernel_requires(config_settings: dict | None) -> list[str]:
    if not _with_kernels(config_settings):
        return []
    has_nvcc = os.environ.get("CUDACXX") or os.environ.get("CUDA_HOME") or shutil.which("nvcc")
    return _pinned("headers.txt") + ([] if has_nvcc else _pinned("cuda.txt"))


def get_requires_for_build_wheel(config_settings=None):
    return _build.get_requires_for_build_wheel(config_settings) + _kernel_requires(config_settings)


def get_requires_for_build_editable(config_settings=None):
    return _build.get_requires_for_build_editable(config_settings) + _kernel_requires(
        config_settings
    )
