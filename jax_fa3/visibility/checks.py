"""Checks of segment ids, intervals, chunks and documents, which say which keys a row sees.

Values are checked if they are known; traced ids and documents that break the rules give NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jax_fa3.arguments import UNDIVIDED, Arguments, Division, values_of
from jax_fa3.operands import Sources
from jax_fa3.options import MAX_SEQLEN, UNBOUNDED
from jax_fa3.validate import check_dtype
from jax_fa3.values import as_int, check_flag, check_offset, one_of, shape_of
from jax_fa3.visibility.layout import Layout
from jax_fa3.visibility.table import Visibility

DOCUMENTS = ("cu_seqlens_q", "cu_seqlens_k")
BY_HEAD = ("kv_start", "kv_end")
OFF = -1  # an unlimited side of a window, as in flash-attn


def check_call(arguments: Arguments, division: Division = UNDIVIDED) -> None:
    """Raises unless a call's arguments of this kind are valid; the others are already checked."""
    check_chunk(arguments.attention_chunk)
    if arguments.visibility is not None:
        _check_visibility(arguments, division.parts)
    for name, x in arguments.sources.items():
        if name == "query_offset":
            continue
        check_dtype(name, x, Sources.rows()[name].dtypes)
        allowed = _shapes(name, arguments)
        if tuple(x.shape) not in allowed:
            raise ValueError(
                f"{name} has shape {shape_of(x)}; expected {one_of(tuple(map(str, allowed)))}"
            )
    extents = arguments.extents
    if arguments.makes_visibility and not extents.have_static_lengths:
        raise NotImplementedError(
            f"{arguments.source_of_visibility} needs static sequence lengths, not "
            f"{extents.seqlen_q} query rows and {extents.seqlen_k} keys; a dense mask does not"
        )
    check_ids(arguments.sources, extents.seqlen_q, extents.seqlen_k)


def check_given(sources: dict[str, Any], chunk: Any, window: tuple[int, int]) -> None:
    """Raises unless some argument is given, and each argument has the arguments that it needs."""
    if not sources and chunk is None:
        names = [name for name in Sources.rows() if name != "query_offset"]
        raise ValueError(
            "every argument of make_visibility is None; expected "
            f"{one_of((*names, 'attention_chunk'))}"
        )
    if "cu_seqlens_q" in sources:
        return
    if "cu_seqlens_k" in sources:
        raise ValueError("cu_seqlens_k is given and cu_seqlens_q is not; expected both")
    if window != (UNBOUNDED, UNBOUNDED):
        raise ValueError(
            "causal or window is given and cu_seqlens_q is not; expected them in "
            "each call, as is_causal and local_window_size"
        )


def check_sources(
    sources: dict[str, Any], seqlen_q: int | None, seqlen_k: int | None
) -> tuple[int, int]:
    """(seqlen_q, seqlen_k) of the sources of `make_visibility`, whose leading dimensions may be
    missing."""
    for name, x in sources.items():
        row = Sources.rows()[name]
        check_dtype(name, x, row.dtypes)
        least = 0 if name == "query_offset" else 1
        if not least <= x.ndim <= len(row.dims):
            raise ValueError(
                f"{name} has {x.ndim} dimensions, shape {shape_of(x)}; expected from {least} to "
                f"{len(row.dims)}"
            )
    of_queries, of_keys = _lengths(sources, "st")
    seqlen_q = _agreed("seqlen_q", seqlen_q, of_queries)
    has_documents = "query_segment_ids" in sources or "cu_seqlens_q" in sources
    if seqlen_k is None and has_documents and not of_keys and "cu_seqlens_k" not in sources:
        seqlen_k = seqlen_q  # keys have the documents of query rows
    seqlen_k = _agreed("seqlen_k", seqlen_k, of_keys)
    _check_extents(sources)
    check_ids(sources, seqlen_q, seqlen_k)
    documents = {name: sources[name] for name in DOCUMENTS if name in sources}
    for name, x in documents.items():
        _check_documents(name, x)
    for x, what, seqlen in (("q", "rows", seqlen_q), ("k", "keys", seqlen_k)):
        name = f"cu_seqlens_{x}"
        name = name if name in documents else "cu_seqlens_q"  # then for keys too
        _check_ends(name, documents.get(name), what, seqlen)
    if sources.keys() >= {"cu_seqlens_q", "cu_seqlens_k"}:
        count_q, count_k = (sources[f"cu_seqlens_{x}"].shape[-1] for x in "qk")
        if count_q != count_k:
            raise ValueError(
                f"cu_seqlens_k has {count_k} entries; expected {count_q} like cu_seqlens_q"
            )
    return seqlen_q, seqlen_k


def check_ids(sources: dict[str, Any], seqlen_q: int, seqlen_k: int) -> None:
    """Raises unless the given ids belong together and follow the rules."""
    ids, of_keys = (sources.get(f"{x}_segment_ids") for x in ("query", "key_value"))
    if ids is None:
        if of_keys is not None:
            raise ValueError(
                "key_value_segment_ids is given and query_segment_ids is not; expected both, or "
                "query_segment_ids alone"
            )
        return
    if of_keys is None:
        if seqlen_q != seqlen_k:
            raise ValueError(
                f"query_segment_ids has shape {shape_of(ids)} and no other array has the ids of "
                f"the {seqlen_k} keys; expected key_value_segment_ids with shape "
                f"{(*ids.shape[:-1], seqlen_k)}"
            )
        _check_runs("query_segment_ids", ids)
        return
    _check_order("query_segment_ids", ids)
    _check_order("key_value_segment_ids", of_keys)


def check_chunk(chunk: Any) -> None:
    """Raises unless `chunk` is None or an int of at least 1."""
    if chunk is not None and as_int("attention_chunk", chunk, "an int or None") < 1:
        raise ValueError(f"attention_chunk is {chunk}; expected at least 1")


def window_of(name: str, window: Any, causal: Any) -> tuple[int, int]:
    """(left, right) in keys, inclusive, of a window in flash-attn's form and `causal`."""
    check_flag("causal", causal)
    expected = "a pair of ints, each at least 0, or -1 for an unlimited side"
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"{name} is {window!r}; expected {expected}")
    sides = [as_int(name, side, expected) for side in window]
    if min(sides) < OFF:
        raise ValueError(f"{name} is {window!r}; expected {expected}")
    left, right = (UNBOUNDED if side == OFF else min(side, UNBOUNDED) for side in sides)
    return left, min(right, 0) if causal else right


def window_text(window: tuple[int, int]) -> str:
    """A window as the argument of `make_visibility`; causal is window[1] = 0."""
    left, right = (OFF if side == UNBOUNDED else side for side in window)
    return f"window=({left}, {right})"


def check_chunk_offset(offset: Any, chunk: Any) -> None:
    """Raises for an offset without chunks; windows use the offset of the call."""
    check_offset("query_offset", offset)
    if offset is not None and chunk is None:
        raise ValueError(
            "query_offset is given and attention_chunk is not; expected both (causal and windowed "
            "attention take the query_offset of each call)"
        )


def _check_visibility(arguments: Arguments, parts: int) -> None:
    """Raises unless `visibility` replaces all its sources and is for the call's whole sequences."""
    visibility, n = arguments.visibility, arguments.extents
    if not isinstance(visibility, Visibility):
        raise TypeError(
            f"visibility is a {type(visibility).__name__}; expected the result of "
            "jax_fa3.make_visibility"
        )
    if arguments.makes_visibility:
        raise ValueError(
            f"visibility and {arguments.source_of_visibility} are given; expected one of them: "
            f"make_visibility takes {arguments.source_of_visibility} too"
        )
    made = visibility.options.seqlen_q, visibility.options.seqlen_k
    whole = n.seqlen_q * parts, n.seqlen_k * parts
    if made != whole:
        raise ValueError(
            f"visibility is for {made[0]} query rows and {made[1]} keys; expected {whole[0]} and "
            f"{whole[1]} like query and key{' on all devices together' if parts > 1 else ''}"
        )
    _check_table(visibility)
    *batch, heads, _ = visibility.table.shape
    if len(batch) > 1 or not batch and arguments.query.ndim == 4:
        forms = ("(batch, heads, words)", "(heads, words) with query of 3 dimensions")
        raise ValueError(
            f"visibility has a table of shape {shape_of(visibility.table)}; expected "
            f"{one_of(forms)}: map the result of a mapped make_visibility with jax.vmap too"
        )
    if batch and batch[0] not in (1, n.batch):
        raise ValueError(
            f"visibility has batch = {batch[0]}; expected {one_of(_some(1, n.batch))} like query"
        )
    if heads not in (1, n.num_heads_q, n.num_heads_kv):
        raise ValueError(
            f"visibility has {heads} heads; expected "
            f"{one_of(_some(1, n.num_heads_q, n.num_heads_kv))} like query or key"
        )


def _check_table(visibility: Visibility) -> None:
    """Raises unless the type of the table is a type that make_visibility returns."""
    table, options = visibility.table, visibility.options
    if not (hasattr(table, "shape") and hasattr(table, "dtype")):
        raise TypeError(
            f"visibility has a table that is a {type(table).__name__}; expected the int32 array "
            "from jax_fa3.make_visibility"
        )
    check_dtype("visibility.table", table, ("int32",))
    words = Layout.of(options.seqlen_q, options.seqlen_k).words
    if len(table.shape) < 2 or table.shape[-1] != words:
        raise ValueError(
            f"visibility has a table of shape {shape_of(table)}; expected (batch, heads, {words}), "
            f"as from jax_fa3.make_visibility for {options.seqlen_q} query rows and "
            f"{options.seqlen_k} keys"
        )


def _shapes(name: str, arguments: Arguments) -> list[tuple[int, ...]]:
    """The valid shapes of a call's array."""
    n = arguments.extents
    rows = n.seqlen_k if name == "key_value_segment_ids" else n.seqlen_q
    heads = dict.fromkeys((n.num_heads_q, n.num_heads_kv)) if name in BY_HEAD else ()
    shapes = [(rows,), *((count, rows) for count in heads)]
    batched = [(n.batch, *shape) for shape in shapes]
    return batched if arguments.query.ndim == 4 else list(dict.fromkeys(shapes + batched))


def _lengths(sources: dict[str, Any], letters: str) -> list[dict[str, int]]:
    """For each letter, the extents of this dimension, by the names of the arrays that have it."""
    dims = {name: Sources.rows()[name].dims for name in sources}
    return [
        {name: sources[name].shape[-1] for name in sources if dims[name].endswith(letter)}
        for letter in letters
    ]


def _agreed(name: str, given: Any, found: dict[str, int]) -> int:
    """The length that is given or found in arrays; raises unless all agree."""
    if given is not None:
        given = as_int(name, given, "an int or None")
        if not 0 <= given < MAX_SEQLEN:
            raise ValueError(f"{name} is {given}; expected at least 0 and less than {MAX_SEQLEN}")
        found = {name: given} | found
    if not found:
        raise ValueError(f"{name} is None; expected an int: no array has this dimension")
    (first, seqlen), *others = found.items()
    for other, n in others:
        if n != seqlen:
            raise ValueError(f"{other} has {n} entries; expected {seqlen} like {first}")
    return seqlen


def _check_extents(sources: dict[str, Any]) -> None:
    """Raises unless all arrays have the same batch, 1 or none, and numbers of heads that fit."""
    full = {name: x for name, x in sources.items() if x.ndim == len(Sources.rows()[name].dims)}
    full |= {name: x for name, x in sources.items() if name in BY_HEAD and x.ndim == 2}
    batch = max((x.shape[0] for x in full.values()), default=1, key=lambda n: n != 1)
    for name, x in full.items():
        if x.shape[0] not in (1, batch):
            raise ValueError(f"{name} has batch = {x.shape[0]}; expected 1 or {batch}")
    by_head = {name: x.shape[1] for name, x in full.items() if x.ndim == 3}
    heads = max(by_head.values(), default=1)
    for name, n in by_head.items():
        if not n or heads % n:
            raise ValueError(f"{name} has {n} heads; expected a divisor of {heads}")


def _check_runs(name: str, ids: Any) -> None:
    """Raises unless the rows of each nonzero id are adjacent."""
    rows = _by_row(ids)
    _raise_at(name, ids, rows < 0, "expected at least 0")
    for b, row in enumerate(rows):
        starts = np.flatnonzero(np.diff(row, prepend=row[:1] - 1))
        order = np.argsort(row[starts], kind="stable")
        run_ids = row[starts][order]
        again = order[1:][(run_ids[1:] == run_ids[:-1]) & (run_ids[1:] != 0)]
        if again.size:
            at = starts[again.min()]
            raise ValueError(
                f"{name} is {row[at]} at {_place(ids, b, at)}, as before another id; expected "
                "adjacent rows for each nonzero id"
            )


def _check_order(name: str, ids: Any) -> None:
    """Raises unless nonzero ids do not decrease, with zeros only before or after all of them."""
    rows = _by_row(ids)
    before = np.maximum.accumulate(rows, axis=1) if rows.size else rows
    gap = np.maximum.accumulate((rows == 0) & (before > 0), axis=1) if rows.size else rows
    _raise_at(name, ids, rows < 0, "expected at least 0")
    _raise_at(
        name,
        ids,
        (rows > 0) & (rows < before),
        "expected nonzero ids that do not decrease",
    )
    _raise_at(
        name,
        ids,
        (rows > 0) & gap.astype(bool),
        "expected zeros only before or after all nonzero ids",
    )


def _check_documents(name: str, cu_seqlens: Any) -> None:
    """Raises unless the ends of documents do not decrease."""
    if cu_seqlens is None:
        return
    if cu_seqlens.shape[-1] == 0:
        raise ValueError(f"{name} has no entries; expected the number of documents plus 1")
    rows = _by_row(cu_seqlens)
    decreases = np.diff(rows, axis=1, prepend=0) < 0
    _raise_at(name, cu_seqlens, decreases, "expected at least 0 and at least the entry before")


def _check_ends(name: str, cu_seqlens: Any, what: str, seqlen: int) -> None:
    """Raises unless documents end at the last row, or key, or before."""
    if cu_seqlens is not None:
        expected = f"expected at most {seqlen}, the number of {what}"
        _raise_at(name, cu_seqlens, _by_row(cu_seqlens) > seqlen, expected)


def _by_row(x: Any) -> np.ndarray:
    """The known values of an array, [batch, seqlen]; without rows if the values are not known."""
    values = values_of(x)
    return np.zeros((0, x.shape[-1]), np.int32) if values is None else np.atleast_2d(values)


def _raise_at(name: str, x: Any, wrong: np.ndarray, expected: str) -> None:
    """Raises for the first element of `_by_row(x)` that is wrong."""
    found = np.argwhere(wrong)
    if found.size:
        b, i = found[0]
        raise ValueError(f"{name} is {_by_row(x)[b, i]} at {_place(x, b, i)}; {expected}")


def _place(x: Any, b: int, i: int) -> str:
    return f"position {i}" + (f" of batch entry {b}" if x.ndim > 1 else "")


def _some(*numbers: int) -> tuple[str, ...]:
    return tuple(map(str, dict.fromkeys(numbers)))
