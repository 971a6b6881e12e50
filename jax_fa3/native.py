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

from jax_fa3.operands import Extents, Operands, Row
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
    rows = [row for name, row in Operands.rows().items() if name in arrays]
    functions = options.functions
    has_blocks = functions is not None and functions.has_blocks
    choices = extents._asdict() | dict(
        window_left=options.window_left,
        window_right=options.window_right,
        has_index_arrays=has_blocks or any(row.hides or row.counts for row in rows),
        has_visibility="visibility" in arrays,
        num_sms=NUM_SMS,
    )
    if target == "forward_float8":
        choices |= dict(value_is_prepared=value_is_prepared, variant="plain")
    else:
        choices |= dict(dtype=KERNEL_DTYPES[dtype], variant=_variant(options, rows))
    if target == "backward":
        choices |= dict(deterministic=options.deterministic)
    return _plan(target, **choices)


def _variant(options: AttentionOptions, rows: list[Row]) -> str:
    """What a call has for which there are kernels of their own: those for a bias, which stands
    before a mask, take both."""
    if options.functions is not None:
        return "blocks" if options.functions.has_blocks else "function"
    found = [row.variant for row in rows if row.variant != "plain"]
    found += ["softcap"] * (options.softcap > 0)
    return next(iter(found), "plain")


@functools.lru_cache(maxsize=1024)
def _plan(family: str, **choices: Any) -> dict[str, Any]:
    assert _C is not None
    return _C.plan(family, **choices)


def plan_forward_cached(dtype: str, sizes: Any, has_block_tables: bool) -> dict[str, Any]:
    """The kernel of attention over a cache, its grid, "workspace_bytes" and "counters"; `sizes` are
    cached.problem.Sizes. Raises ValueError with the reason if there is none."""
    if _C is None:
        raise ValueError(IMPORT_ERROR)
    n = sizes
    is_ragged = n.rows == 0
    return _plan(
        "forward_cached",
        dtype=KERNEL_DTYPES[dtype],
        batch=n.batch,
        seqlen_q=n.tokens if is_ragged else n.rows,
        seqlen_k=n.page_size,
        num_heads_q=n.num_heads_q,
        num_heads_kv=n.num_heads_kv,
        head_dim=n.head_dim,
        head_dim_v=n.head_dim_v,
        is_ragged=is_ragged,
        page_size=n.page_size if has_block_tables else 0,
        num_sms=NUM_SMS,
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
