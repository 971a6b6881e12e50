"""Kernels linked with a call's functions: machine code, which travels in the program.

The package has its kernels for functions as LTO-IR, which calls what a text defines. A kernel and a
text give the same machine code in every process; what was linked once is kept, in the process and
on disk.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax

from jax_fa3.flex import cache, toolchain
from jax_fa3.flex.functions import Functions
from jax_fa3.flex.ranges import SMALL
from jax_fa3.flex.translate import Translation, translate
from jax_fa3.operands import Extents
from jax_fa3.options import MAX_SEQLEN

logger = logging.getLogger("jax_fa3")

FOLDER = Path(__file__).parent / "kernels"
NAME = ("dtype", "head_dim", "head_dim_v", "block_m", "block_n", "separate_dq", "variant")


class LinkedKernel(NamedTuple):
    """A kernel as an attribute of a custom call (LinkedKernel in src/ffi)."""

    key: str  # the SHA-256 of the machine code
    code: str  # the machine code, a cubin, in base64


MUCH_SPILLED = 512  # bytes of a kernel, more than what any function of the library makes
NO_KERNEL = LinkedKernel("", "")


def why_not() -> str | None:
    """Why nothing can be linked here; None where it can."""
    if not any(FOLDER.glob("*.fatbin")):
        return f"this build has no kernels for functions in {FOLDER}"
    found = toolchain.find()
    return found if isinstance(found, str) else None


def names(plan: dict[str, object]) -> dict[str, str]:
    """The kernels of a forward or backward plan that are to be linked: the files' names, by the
    attributes of the custom call."""
    words = "_".join(str(plan[name]).lower() for name in NAME if name in plan)
    found = {"kernel": f"{plan['direction']}_{words}"}
    if plan.get("separate_dq"):
        found["dquery_kernel"] = f"backward_dq_{words}"
    return found


Types = tuple[tuple[tuple[int, ...], str], ...]  # a shape and a dtype each

# Short sequences have texts that know it; they are the same for all lengths. A kernel also asks for
# the rows and keys with which it fills up the last tile.
MOST_INDEX = SMALL // 2 - 1
LARGEST_TILE = 256


def translation(
    functions: Functions, captured: Iterable[jax.Array], extents: Extents
) -> Translation:
    """The CUDA C text of functions of captured arrays, or types of such, in calls of these extents.
    Raises Untranslatable."""
    lengths = extents.seqlen_q, extents.seqlen_k
    is_short = extents.have_static_lengths and max(lengths) <= MOST_INDEX - LARGEST_TILE
    types = tuple((x.shape, x.dtype.name) for x in captured)
    return _translation(functions, types, MOST_INDEX if is_short else MAX_SEQLEN)


@functools.lru_cache(maxsize=256)
def _translation(functions: Functions, captured: Types, most_index: int) -> Translation:
    types = tuple(jax.ShapeDtypeStruct(*x) for x in captured)
    return translate(functions.score, functions.mask, types, most_index)


@functools.lru_cache(maxsize=256)
def linked(name: str, text: str) -> LinkedKernel:
    """The kernel of this name with the functions of a text. Raises RuntimeError with what the
    libraries say."""
    libraries = toolchain.find()
    if isinstance(libraries, str):
        raise RuntimeError(f"the kernel {name} cannot be linked: {libraries}")
    path = FOLDER / f"{name}.fatbin"
    try:
        kernel = path.read_bytes()
    except OSError as error:
        raise RuntimeError(f"the kernel {path} cannot be read ({error.strerror})") from error
    key = cache.key(kernel, text, libraries.identity)
    code = cache.load(key)
    if code is None:
        begin = time.perf_counter()
        code, log = libraries.link(kernel, libraries.compile(text))
        logger.debug("linked %s in %.1f s", name, time.perf_counter() - begin)
        _tell_of_spills(name, log)
        cache.store(key, code)
    return LinkedKernel(hashlib.sha256(code).hexdigest(), base64.b64encode(code).decode())


def _tell_of_spills(name: str, log: str) -> None:
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", log)))
    if spilled > MUCH_SPILLED:
        text = "%s has too few registers for its functions and spills %d bytes, which is slow"
        logger.warning(text, name, spilled)
