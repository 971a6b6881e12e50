"""What a call must look like, checked at trace time before anything is built from it: its arrays,
and what goes together. Python values have their checks in values.py.

Each error names the argument, what was got and what was expected. TypeError: a wrong dtype, or
an array where a Python value must stand. ValueError: shapes or values that do not fit. What is
legal but has no kernel is route.py's matter.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_fa3.arguments import Arguments, dtype_name
from jax_fa3.operands import ANY_SEQUENCE, DTYPES, FLOAT8_INPUTS, Extents, Row
from jax_fa3.options import BLOCK, FLOAT8, MAX_SEQLEN, padded_keys
from jax_fa3.values import check_values, one_of, shape_of

HALF_DTYPES = ("bfloat16", "float16")
WORDS = {"b": "batch", "h": "heads", "s": "seqlen_q", "t": "seqlen_k"}


def check_call(arguments: Arguments) -> None:
    """Raises unless these are legal arguments of dot_product_attention (arrays or their types)."""
    check_values(arguments)
    query, key = arguments.query, arguments.key
    if arguments.value_is_prepared:
        check_prepared(key, arguments.value)
    check_heads(query, key, arguments.plain_value, (*DTYPES, FLOAT8))
    check_float8(arguments)
    check_arrays(arguments)
    check_sequence_parallel(arguments)


def check_heads(query: Any, key: Any, value: Any, dtypes: tuple[str, ...] = DTYPES) -> None:
    """Ranks, dtypes and extents of query, key and value, and that they fit each other."""
    arrays = {"query": query, "key": key, "value": value}
    for name, x in arrays.items():
        if x is None:
            raise TypeError(f"{name} is None; expected an array")
        shape, ndim = x.shape, x.ndim
        if ndim not in (3, 4):
            raise ValueError(
                f"{name} has {ndim} dimensions, shape {shape_of(x)}; expected "
                "([batch,] seq, heads, head_dim)"
            )
        check_dtype(name, x, dtypes)
        if ndim != query.ndim:
            raise ValueError(
                f"{name} has {ndim} dimensions, shape {shape_of(x)}; expected {query.ndim} like "
                f"query, shape {shape_of(query)}"
            )
        if x.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}; expected {query.dtype} like query")
        if isinstance(shape[-3], int) and shape[-3] >= MAX_SEQLEN:
            raise ValueError(f"{name} has seq = {shape[-3]}; expected less than {MAX_SEQLEN}")
        for axis, what in ((-2, "heads"), (-1, "head_dim")):
            if shape[axis] == 0:
                raise ValueError(f"{name} has {what} = 0, shape {shape_of(x)}; expected at least 1")
    if query.ndim == 4:
        _check_equal("batch", -4, key=key, query=query)
        _check_equal("batch", -4, value=value, query=query)
    _check_equal("head_dim", -1, key=key, query=query)
    _check_equal("seq", -3, value=value, key=key)
    _check_equal("heads", -2, value=value, key=key)
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"query has {query.shape[-2]} heads; expected a multiple of key's {key.shape[-2]} heads"
            + _manual_axes_hint()
        )


def check_prepared(key: Any, value: Any) -> None:
    """A prepared value in float8, whose shape fits key's."""
    for name, x in (("key", key), ("value", value)):
        if x is None or x.ndim not in (3, 4) or dtype_name(x) != FLOAT8:
            got = "None" if x is None else f"{x.dtype} of shape {shape_of(x)}"
            raise TypeError(
                f"{name} is {got}; expected {FLOAT8} of 3 or 4 dimensions with value_is_prepared"
            )
    *batch, seqlen, heads, _ = key.shape
    want = (*batch, heads, value.shape[-2], padded_keys(seqlen))
    if tuple(value.shape) != want:
        raise ValueError(
            f"value has shape {shape_of(value)}; expected {want} with value_is_prepared and key of "
            f"shape {shape_of(key)}: ([batch,] heads, head_dim, seq up to a multiple of {BLOCK})"
        )


def check_float8(arguments: Arguments) -> None:
    """forward_dtype goes with 16-bit inputs, scales with float8 inputs."""
    dtype, forward_dtype = arguments.dtype, arguments.forward_dtype
    if forward_dtype is not None:
        try:
            name = jnp.dtype(forward_dtype).name
        except TypeError:
            name = None
        if name != FLOAT8:
            raise ValueError(f"forward_dtype is {forward_dtype!r}; expected None or {FLOAT8!r}")
        if dtype not in HALF_DTYPES:
            raise TypeError(
                f"query has dtype {dtype}; expected {one_of(HALF_DTYPES)} with forward_dtype"
            )
        if not arguments.extents.have_static_lengths:
            n = arguments.extents
            raise NotImplementedError(
                f"forward_dtype needs static sequence lengths, not {n.seqlen_q} query rows and "
                f"{n.seqlen_k} keys"
            )
    rows = arguments.Operands.rows()
    for name in arguments.arrays:
        if rows[name].form == "blocks" and not arguments.is_float8:
            raise ValueError(
                f"{name} is given and query has dtype {dtype}; expected {FLOAT8} "
                "inputs with it (forward_dtype measures the scales of 16-bit inputs)"
            )


def check_arrays(arguments: Arguments) -> None:
    """Dtypes and shapes of all arrays but query, key and value, by their rows."""
    extents, is_batched = arguments.extents, arguments.query.ndim == 4
    for field, x in arguments.arrays.items():
        row = arguments.Operands.rows()[field]
        name = row.argument or field
        if name in ("query", "key", "value", "prepared_value"):
            continue
        check_dtype(name, x, row.dtypes)
        if row.form == "broadcast":
            check_broadcast(name, x, row, extents)
            continue
        allowed = _shapes(row, extents, is_batched)
        if tuple(x.shape) in allowed:
            continue
        shapes = tuple(map(str, dict.fromkeys(allowed)))
        expected = one_of(shapes) if row.form == "blocks" else shapes[0]
        expected += ", one per sequence" if row.dims == ANY_SEQUENCE else ""
        expected += ", one for each head of query" if row.form == "heads" else ""
        raise ValueError(f"{name} has shape {shape_of(x)}; expected {expected}")


def _shapes(row: Row, extents: Extents, is_batched: bool) -> list[tuple[int, ...]]:
    """The shapes that a public argument may have."""
    sizes = row.sizes(extents)
    if row.form == "heads":
        return [sizes[1:]]
    if row.form == "blocks":
        by_head = sizes[:2] if is_batched else sizes[1:2]
        blocks = [(*by_head, 1), (*by_head, *sizes[2:])] if len(sizes) > 2 else []
        return [(), by_head, *blocks]
    without_batch = [] if is_batched else [sizes[1:]]
    return [sizes, *without_batch, *[()] * (row.form == "scalar")]


def check_broadcast(name: str, x: Any, row: Row, extents: Extents) -> None:
    """An array of which any dimension may have extent 1, and leading ones may be missing."""
    full = row.sizes(extents)
    sizes = (1,) * (len(full) - x.ndim) + tuple(x.shape)
    if x.ndim > len(full) or any(n not in (1, m) for n, m in zip(sizes, full, strict=True)):
        words = ", ".join(WORDS[letter] for letter in row.dims)
        raise ValueError(
            f"{name} has shape {shape_of(x)}; expected a shape that broadcasts to {full}, ({words})"
        )


def check_sequence_parallel(arguments: Arguments) -> None:
    """Only sequences that may be divided have a choice of how."""
    whole = FLOAT8_INPUTS if arguments.is_float8 else arguments.needs_whole
    if arguments.sequence_parallel != "auto" and whole:
        raise ValueError(
            f"sequence_parallel is {arguments.sequence_parallel!r}; expected 'auto' with {whole}, "
            f"which need{'' if arguments.is_float8 else 's'} whole sequences"
        )


def check_dtype(name: str, x: Any, dtypes: tuple[str, ...]) -> None:
    if dtype_name(x) not in dtypes:
        raise TypeError(f"{name} has dtype {x.dtype}; expected {one_of(dtypes)}")


def _check_equal(what: str, axis: int, **pair: Any) -> None:
    (name, x), (other, y) = pair.items()
    if x.shape[axis] != y.shape[axis]:
        raise ValueError(
            f"{name} has {what} = {x.shape[axis]}, shape {shape_of(x)}; expected {y.shape[axis]} "
            f"like {other}, shape {shape_of(y)}"
        )


def _manual_axes_hint() -> str:
    """What may be wrong with heads inside jax.shard_map, where they are those of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    manual = [repr(name) for name, kind in kinds if kind == jax.sharding.AxisType.Manual]
    if not manual:
        return ""
    return (
        f" (these are one device's heads, inside jax.shard_map over {', '.join(manual)}: if query "
        "heads are split over a mesh axis and key heads are not, select each device's own heads of "
        "key and value, as docs/sharding.md shows)"
    )
