"""The native module `_C`, imported here and nowhere else, so that the package also works where it
is missing: its FFI handlers, its list of kernels and its plans.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from jax_fa3.operands import Extents, Operands
from jax_fa3.options import NUM_SMS, AttentionOptions

FOLDER = Path(__file__).resolve().parent


def _why_missing(error: ImportError) -> str:
    """Why `_C` cannot be imported. Where no such file is, Python's own words are of circular
    imports."""
    if any(FOLDER.glob("_C*.so")):
        return f"the extension module jax_fa3._C cannot be imported ({error})"
    reason = f"there is no extension module _C in {FOLDER}"
    if not (FOLDER.parent / "CMakeLists.txt").exists():
        return f"{reason}; install jax_fa3 again for this Python"
    if _is_installed_elsewhere():
        return (
            f"{reason}, a source folder, which hides the installed jax_fa3; start Python in "
            "another folder, or run `make inplace` here"
        )
    return f"{reason}, a source folder; run `make inplace` or `pip install .` there"


def _is_installed_elsewhere() -> bool:
    """Whether a copy of the package is installed, other than this one."""
    try:
        files = importlib.metadata.distribution("jax_fa3").files or ()
    except importlib.metadata.PackageNotFoundError:
        return False
    folders = {Path(str(x.locate())).resolve().parent for x in files if x.match("jax_fa3/_C.*")}
    return bool(folders - {FOLDER})


try:
    from jax_fa3 import _C

    IMPORT_ERROR = None
except ImportError as error:
    _C = None
    IMPORT_ERROR = _why_missing(error)

KERNEL_DTYPES = {"bfloat16": "bf16", "float16": "fp16"}

# Arrays with which work tiles differ in length, and those for which there are kernels of their own.
HIDING = {name for name, row in Operands.rows().items() if row.counts} | {"visibility", "mask"}
DENSE = "bias", "mask"  # those for a bias take a mask too

Target = Literal["forward", "forward_float8", "backward"]


def module() -> ModuleType | None:
    """The extension module, or None where it cannot be imported."""
    return _C


def registrations() -> dict[str, Any]:
    """FFI target name -> handler capsule; empty without kernels."""
    return {} if _C is None else _C.registrations()


def plan(
    target: Target,
    dtype: str,
    extents: Extents,
    options: AttentionOptions,
    value_is_prepared: bool = False,
    arrays: Iterable[str] = (),
) -> dict[str, Any]:
    """The kernel that runs a call, its tiles and grid, and "workspace_bytes" if it needs any.

    `dtype` is query's name; `arrays` those of Operands that the call has, of which the kernel and
    the order of work depend. Raises ValueError with the reason if there is none.
    """
    arrays = set(arrays)
    functions = options.functions
    has_blocks = functions is not None and functions.has_blocks
    presence = has_blocks or not arrays.isdisjoint(HIDING), "visibility" in arrays
    if target == "forward_float8":
        mask = *options.window, *presence
        return _remembered(target, *extents, *mask, value_is_prepared, NUM_SMS)
    call = KERNEL_DTYPES[dtype], *extents
    presence = *presence, _variant(options, arrays)
    if target == "forward":
        return _remembered(target, *call, *options.window, *presence, NUM_SMS)
    return _remembered(target, *call, *presence, options.deterministic, NUM_SMS)


def _variant(options: AttentionOptions, arrays: set[str]) -> str:
    """What a call has for which there are kernels of their own (Variant in src/call/types.h)."""
    if options.functions is not None:
        return "blocks" if options.functions.has_blocks else "function"
    dense = next((name for name in DENSE if name in arrays), None)
    if dense is not None:
        return dense
    return "softcap" if options.softcap else "alibi" if "alibi_slopes" in arrays else "plain"


@functools.lru_cache(maxsize=1024)
def _remembered(target: Target, *call: Any) -> dict[str, Any]:
    return getattr(_C, f"{target}_plan")(*call)


NO_CACHE_KERNELS = IMPORT_ERROR or "this build has no kernels for caches"


def has_cache_kernels() -> bool:
    return hasattr(_C, "plan_forward_cached")


def plan_forward_cached(dtype: str, sizes: Any, has_block_tables: bool) -> dict[str, Any]:
    """The kernel of attention over a cache, its grid, "workspace_bytes" and "counters"; `sizes` are
    cached.problem.Sizes. Raises ValueError with the reason if there is none."""
    if not has_cache_kernels():
        raise ValueError(NO_CACHE_KERNELS)
    n = sizes
    call = (n.batch, n.tokens, n.rows, n.num_heads_q, n.num_heads_kv, n.head_dim, n.head_dim_v)
    return _C.plan_forward_cached(
        KERNEL_DTYPES[dtype], *call, n.page_size, has_block_tables, NUM_SMS
    )


def refusal(*call: Any) -> str | None:
    """Why there is no plan for a call, given as to `plan`."""
    if _C is None:
        return IMPORT_ERROR
    try:
        plan(*call)
    except ValueError as error:
        return str(error)
    return None
