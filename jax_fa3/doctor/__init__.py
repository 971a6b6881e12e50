"""`jax_fa3.doctor()` and `python -m jax_fa3.doctor`: what is installed, and what runs a call here.

This is a package with a __main__, not one file, because `jax_fa3.doctor` is also the function.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections import defaultdict
from typing import Any

import jax

from jax_fa3 import api, native, route
from jax_fa3.arguments import Arguments
from jax_fa3.flex import cache, link, toolchain
from jax_fa3.values import is_array

PACKAGES = ("jax_fa3", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "flax")


def doctor(query: Any = None, key: Any = None, value: Any = None, **options: Any) -> None:
    """Prints versions, GPUs and compiled kernels, and, for a given call, what would run it.

    Args:
      query, key, value: arrays or `jax.ShapeDtypeStruct`; key and value default to query.
      options: keyword arguments of `dot_product_attention`.

    Example:
      >>> jax_fa3.doctor(jax.ShapeDtypeStruct((2, 4096, 16, 128), "bfloat16"), is_causal=True)
    """
    sections = {"versions": _versions(), "GPU": _gpus(), "kernels": _kernels()}
    sections["functions"] = _functions()
    if query is not None:
        key = query if key is None else key
        value = key if value is None else value
        sections["call"] = _call(query, key, value, options)
    for title, lines in sections.items():
        for i, line in enumerate(lines):
            print(f"{title if i == 0 else '':<9} {line}")


def _versions() -> list[str]:
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return [", ".join(found)]


def _gpus() -> list[str]:
    lines = []
    if shutil.which("nvidia-smi"):
        fields = "--query-gpu=name,compute_cap,driver_version"
        command = ["nvidia-smi", fields, "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        lines += [f"{line} (nvidia-smi)" for line in answer.stdout.splitlines()]
    lines.append(f"JAX's default backend is {jax.default_backend()!r}")
    reason = route.device_reason()
    lines.append(f"no kernel can run: {reason}" if reason else "the kernels can run here")
    return lines


def _kernels() -> list[str]:
    module = native.module()
    if module is None:
        return [str(native.IMPORT_ERROR)]
    compiled = module.compiled_kernels()
    if not compiled:
        listed = len(module.listed_kernels())
        return [f"0 compiled of {listed} (built with JAX_FA3_CUDA=OFF); calls run through XLA"]
    tiles: defaultdict[Any, dict[str, None]] = defaultdict(dict)
    for kernel in compiled:
        tile = f"{kernel['block_m']}x{kernel['block_n']}"
        variant = kernel.get("variant", "plain")
        family = kernel["direction"] + (f" {variant}" if variant != "plain" else "")
        tiles[family, kernel["dtype"], kernel["head_dim"]][tile] = None
    rows = [f"{len(compiled)} compiled of {len(module.listed_kernels())}; tiles queries x keys:"]
    rows += [
        f"{family:<16} {dtype} head_dim {head_dim:>3}: {', '.join(names)}"
        for (family, dtype, head_dim), names in tiles.items()
    ]
    return rows


def _functions() -> list[str]:
    """What links kernels with score and mask functions, and where what was linked is kept."""
    names = {"NVRTC": "nvrtc_version", "nvJitLink": "nvjitlink_version"}
    found = toolchain.find()
    lines = []
    if not isinstance(found, str):
        versions = {name: getattr(found, field) for name, field in names.items()}
        lines.append(", ".join(f"{name} {x[0]}.{x[1]}" for name, x in versions.items()))
    reason = link.why_not()
    lines.append(f"no kernel can be linked: {reason}" if reason else "kernels can be linked here")
    folder = cache.folder()
    if folder is None:
        kept = f"nowhere ({cache.VARIABLE} is empty)"
    elif reason := cache.why_not(folder):
        kept = f"nowhere: {reason}"
    else:
        kept = f"in {folder}, {cache.size() / 2**20:.1f} MiB"
    return [*lines, f"linked kernels are kept {kept}"]


def _call(query: Any, key: Any, value: Any, options: dict[str, Any]) -> list[str]:
    arguments = Arguments(query, key, value, **options)
    given = [
        f"{name} {x.dtype}{list(x.shape)}" if is_array(x) else f"{name}={x}"
        for name, x in (dict(query=query, key=key, value=value) | options).items()
        if x is not None
    ]
    reasons = api.reasons_against(arguments)
    why = f": {reasons.first}" if reasons.first else ""
    lines = [", ".join(given), f"would run {reasons.runs}{why}"]
    for direction, plan in route.plans(arguments, arguments.options()).items():
        named = ", ".join(f"{name}={x}" for name, x in plan.items() if name != "direction")
        lines.append(f"{direction} plan: {named}")
    return lines
