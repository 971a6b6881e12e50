"""The table of visibility, made from its sources in plain JAX, and what it tells.

Every source lets row i see one interval of keys, [begin, end), perhaps an empty one; a row sees the
intersection. A plane is monotone where neither end falls from one row that sees something to the
next; then the rows that may see a key are an interval too.

    rows          the interval; of a row that sees nothing (the greatest begin, ~ the greatest end)
                  up to there, so that the end is negative
    row_bounds    the least begin and greatest end of the rows that see something (NONE, 0 without
                  any); the greatest begin and least end of all, NONE and 0 for one that does not
    keys          of a monotone plane the rows from the first whose end is greater, up to the first
                  whose begin is; (0, 0) of an unseen key, and in other planes
    key_bounds    the bounds of keys' intervals; in other planes those of the groups of rows that
                  reach into the group of keys, (NONE, NONE, 0, 0) without any
    rows_end      the number of rows up to the last that sees something; keys_end likewise

Ids and documents that break their rule make a plane that is not valid: every row sees everything,
and the call gives NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_fa3.operands import Operands, Sources
from jax_fa3.options import MAX_SEQLEN, UNBOUNDED, VisibilityOptions
from jax_fa3.visibility.layout import GROUP, MONOTONE, NONE, VALID, Layout, groups, whole

MOST = np.iinfo(np.int32).max


@functools.partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["options"])
@dataclasses.dataclass(frozen=True, eq=False)
class Visibility:
    """The table of the keys that each row sees, in the form of the kernels, from `make_visibility`.

    A pytree: it may be an argument of jax.jit and of programs that jax.export serializes, a mapped
    argument of jax.vmap, and a constant of a scan.
    """

    table: Array  # int32 (B or 1, heads or 1, words)
    options: VisibilityOptions

    def __repr__(self) -> str:
        """Shows only the type of the table, which may be large."""
        x = self.table
        table = f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else repr(x)
        return f"Visibility(table={table}, options={self.options})"


def _options_to_bytes(of_tree: tuple[VisibilityOptions]) -> bytes:
    (options,) = of_tree
    return json.dumps(dataclasses.asdict(options)).encode()


def _options_from_bytes(data: bytes) -> tuple[VisibilityOptions]:
    return (VisibilityOptions(**json.loads(data)),)


jax.export.register_pytree_node_serialization(
    Visibility,
    serialized_name="jax_fa3.Visibility",
    serialize_auxdata=_options_to_bytes,
    deserialize_auxdata=_options_from_bytes,
)


class Plane:
    """What a call reads of tables: [batch | 1, heads | 1, ...]."""

    def __init__(self, table: Array):
        self.table = table

    @property
    def is_valid(self) -> Array:
        """bool [batch | 1, heads | 1]."""
        return self.table[..., 0] & VALID != 0

    @property
    def rows_end(self) -> Array:
        return self.table[..., 1]

    @property
    def keys_end(self) -> Array:
        return self.table[..., 2]

    def rows(self, seqlen_q: int) -> tuple[Array, Array]:
        """(begin, end) of the keys that each row sees, [batch | 1, heads | 1, seqlen_q]; an end may
        be negative."""
        first = Layout.of(seqlen_q, 0).rows
        intervals = self.table[..., first : first + 2 * seqlen_q]
        return intervals[..., ::2], intervals[..., 1::2]


def in_row_dims(sources: Sources) -> Sources:
    """Checked sources of public shapes with the dimensions of their rows, so that all have the
    table's batch and heads."""

    def filled(row, x):
        """With the dimensions that are missing: the batch, or the heads between it and the rows."""
        if x.ndim < len(row.dims) and "h" in row.dims:
            batch = x.shape[:-1] or (1,)
            return x.reshape(*batch, 1, x.shape[-1])
        return x if x.ndim == len(row.dims) else x[None]

    sources = sources.map(filled)
    arrays = sources.present().values()
    batch = max((x.shape[0] for x in arrays), key=lambda n: n != 1)
    heads = max((x.shape[1] for x in arrays if x.ndim == len("bhs")), default=1)

    def whole(row, x):
        x = with_heads(x, heads) if "h" in row.dims else x
        return x if x.shape[0] == batch else jnp.broadcast_to(x, (batch, *x.shape[1:]))

    return sources.map(whole)


def with_heads(x: Array, heads: int) -> Array:
    """x [batch, heads or a divisor, ...] with each of its heads for as many others as fit."""
    batch, own, *rest = x.shape
    if own == heads:
        return x
    x = jnp.broadcast_to(x[:, :, None], (batch, own, heads // own, *rest))
    return x.reshape(batch, heads, *rest)  # which, unlike jnp.repeat, explicit axes may split


def make(options: VisibilityOptions, sources: Sources) -> Operands:
    """The table of sources that have their rows' dimensions: `visibility`, int32 [batch, heads,
    words]."""
    begin, end, is_valid = _intervals(options, sources)
    seen = begin < end
    greatest_begin, greatest_end = (lax.cummax(jnp.where(seen, x, 0), axis=2) for x in (begin, end))
    is_monotone = (~seen | ((begin == greatest_begin) & (end == greatest_end))).all(-1)
    of_rows = _bounds(begin, end)
    keys = _rows_that_see(greatest_begin, greatest_end, options.seqlen_k)
    of_keys = jnp.where(
        is_monotone[..., None, None],
        _bounds(*keys),
        _groups_that_reach(of_rows, options),
    )
    keys = jnp.where(is_monotone[..., None, None], jnp.stack(keys, -1), 0)
    rows = jnp.stack(
        [jnp.where(seen, begin, greatest_begin), jnp.where(seen, end, ~greatest_end)], -1
    )
    number = 1 + _numbers(options.seqlen_q, 3)
    plane = [
        jnp.where(is_valid, VALID, 0) + jnp.where(is_monotone, MONOTONE, 0),
        jnp.where(seen, number, 0).max(-1, initial=0),
        jnp.where(seen, end, 0).max(-1, initial=0),
        jnp.zeros_like(is_valid),
    ]
    parts = [jnp.stack([x.astype(jnp.int32) for x in plane], -1), rows, of_rows, of_keys, keys]
    return Operands(visibility=jnp.concatenate([_part(x) for x in parts], -1))


def with_legal_documents(
    options: VisibilityOptions, sources: Sources, tables: Operands
) -> Operands:
    """Tables that were made of such sources, with planes that are not valid where documents break
    their rule: those begin at 0 or later, do not fall, and end at the last row and key."""
    if sources.cu_seqlens_q is None:
        return tables
    is_valid = _are_documents(sources.cu_seqlens_q, options.seqlen_q)
    is_valid &= _are_documents(sources.cu_seqlens_k, options.seqlen_k)
    made = jnp.where(is_valid[:, None, None], tables.visibility, _not_valid(options))
    return Operands(visibility=made)


def with_summary(tables: Array, is_valid: Array, rows_end: Array) -> Array:
    """Tables whose planes are valid where `is_valid`, and of no fewer rows than `rows_end`, from
    which on all others are padding; bool and int32 [batch | 1, heads | 1]."""
    flags = jnp.where(is_valid, tables[..., 0], tables[..., 0] & ~VALID)
    rows_end = jnp.maximum(tables[..., 1], rows_end)
    return tables.at[..., :2].set(jnp.stack([flags, rows_end], -1))


def _are_documents(cu_seqlens: Array, seqlen: int) -> Array:
    """bool [batch], of [batch, count]."""
    falls = cu_seqlens[:, 1:] < cu_seqlens[:, :-1]
    return (cu_seqlens[:, 0] >= 0) & ~falls.any(1) & (cu_seqlens[:, -1] <= seqlen)


def _not_valid(options: VisibilityOptions) -> Array:
    """A plane that is not valid, int32 [1, 1, words]."""
    rows, keys = options.seqlen_q, options.seqlen_k
    parts = [
        (1, (MONOTONE, rows, keys, 0)),
        (rows, (0, keys)),
        (groups(rows), (0, 0, keys, keys)),
        (groups(keys), (0, 0, rows, rows)),
        (keys, (0, rows)),
    ]
    # Of numbers, not of a constant array, which custom_partitioning does not take.
    words = [
        _part(jnp.stack([jnp.full((1, 1, count), word, jnp.int32) for word in entry], -1))
        for count, entry in parts
    ]
    return jnp.concatenate(words, -1)


def _intervals(options: VisibilityOptions, sources: Sources) -> tuple[Array, Array, Array]:
    """(begin, end) of the keys that rows see, [batch, heads, seqlen_q], both within the keys, and
    whether the ids keep their rule, [batch, heads]."""
    shape = (*sources.batch_and_heads, options.seqlen_q)
    row = _numbers(options.seqlen_q, 2)
    begins, ends = [jnp.zeros(shape, jnp.int32)], [jnp.full(shape, options.seqlen_k, jnp.int32)]
    is_valid = jnp.full(shape[:1], True)

    def see(begin, end):
        """begin, end: [batch, seqlen_q]."""
        begins.append(begin[:, None])
        ends.append(end[:, None])

    if sources.query_segment_ids is not None:
        ids, of_keys = sources.query_segment_ids, sources.key_value_segment_ids
        begin, end, is_valid = _own_runs(ids) if of_keys is None else _runs_of_keys(ids, of_keys)
        see(begin, jnp.where(ids == 0, 0, end))
    if sources.kv_start is not None:
        begins.append(sources.kv_start)
    if sources.kv_end is not None:
        ends.append(sources.kv_end)
    if sources.cu_seqlens_q is not None:
        see(*_of_documents(options, row, sources.cu_seqlens_q, sources.cu_seqlens_k))
    if options.attention_chunk:
        offset = sources.query_offset
        offset = options.query_offset if offset is None else offset[:, None]
        position = row + jnp.clip(offset, -MAX_SEQLEN, MAX_SEQLEN)
        begin = position // options.attention_chunk * options.attention_chunk
        see(begin, begin + options.attention_chunk)
    is_valid = is_valid[:, None, None]
    begin = jnp.where(is_valid, functools.reduce(jnp.maximum, begins), 0)
    end = jnp.where(is_valid, functools.reduce(jnp.minimum, ends), options.seqlen_k)
    return begin, end, jnp.broadcast_to(is_valid[..., 0], shape[:2])


def _own_runs(ids: Array) -> tuple[Array, Array, Array]:
    """(begin, end) of the run of equal ids around each row, [batch, seqlen], and whether every id
    has one run only, [batch]."""
    seqlen = ids.shape[1]
    position = _numbers(seqlen, 2)
    is_first = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    begin = lax.cummax(jnp.where(is_first, position, 0), axis=1)
    next_begin = jnp.where(is_first, position, seqlen)[:, 1:]
    next_begin = jnp.pad(next_begin, ((0, 0), (0, 1)), constant_values=seqlen)
    end = lax.cummin(next_begin, axis=1, reverse=True)
    runs = jnp.sort(jnp.where(is_first, ids, 0), axis=1)
    comes_back = (runs[:, 1:] == runs[:, :-1]) & (runs[:, 1:] != 0)
    return begin, end, ~comes_back.any(1) & (ids >= 0).all(1)


def _runs_of_keys(ids: Array, of_keys: Array) -> tuple[Array, Array, Array]:
    """(begin, end) of the run of each row's id among those of keys, and whether the ids keep their
    rule: those that are not 0 do not fall, and stand together."""
    is_valid = _are_in_order(ids) & _are_in_order(of_keys)
    # Zeros behind the ids count as the greatest, so that the array never falls.
    behind = (of_keys == 0) & (lax.cummax(of_keys, axis=1) > 0)
    of_keys, used = jnp.where(behind, MOST, of_keys), (~behind).sum(1, jnp.int32, keepdims=True)
    return _count(of_keys, ids - 1), jnp.minimum(_count(of_keys, ids), used), is_valid


def _are_in_order(ids: Array) -> Array:
    """bool [batch]."""
    before = lax.cummax(ids, axis=1)
    in_gap = lax.cummax(((ids == 0) & (before > 0)).astype(jnp.int32), axis=1) > 0
    wrong = (ids < 0) | ((ids > 0) & ((ids < before) | in_gap))
    return ~wrong.any(1)


def _of_documents(
    options: VisibilityOptions, row: Array, cu_seqlens_q: Array, cu_seqlens_k: Array
) -> tuple[Array, Array]:
    """(begin, end) of the keys of each row's document that are in the window around the row, which
    is aligned at the ends of both, [batch, seqlen_q]."""
    count = cu_seqlens_q.shape[1] - 1
    document = _count(cu_seqlens_q, jnp.broadcast_to(row, (cu_seqlens_q.shape[0], row.size))) - 1
    is_inside = (document >= 0) & (document < count)

    def bounds(cu_seqlens, seqlen):
        cu_seqlens = jnp.clip(cu_seqlens, 0, seqlen)
        return (jnp.take_along_axis(cu_seqlens, document + i, axis=1, mode="clip") for i in (0, 1))

    q_begin, q_end = bounds(cu_seqlens_q, options.seqlen_q)
    begin, end = bounds(cu_seqlens_k, options.seqlen_k)
    position = row - q_end + end
    left, right = options.window_left, options.window_right
    if left < UNBOUNDED:
        begin = jnp.maximum(begin, position - left)
    if right < UNBOUNDED:
        end = jnp.minimum(end, position + right + 1)
    return begin, jnp.where(is_inside, end, 0)


def _bounds(begin: Array, end: Array) -> Array:
    """[..., groups, 4] of intervals [..., seqlen]."""
    seen = begin < end

    def grouped(x, reduce, fill):
        *leading, seqlen = x.shape
        missing = groups(seqlen) * GROUP - seqlen
        x = jnp.pad(x, [(0, 0)] * len(leading) + [(0, missing)], constant_values=fill)
        return reduce(x.reshape(*leading, groups(seqlen), GROUP), axis=-1)

    parts = [
        grouped(jnp.where(seen, begin, NONE), jnp.min, NONE),
        grouped(jnp.where(seen, begin, NONE), jnp.max, 0),
        grouped(jnp.where(seen, end, 0), jnp.min, NONE),
        grouped(jnp.where(seen, end, 0), jnp.max, 0),
    ]
    return jnp.stack(parts, -1)


def _rows_that_see(
    greatest_begin: Array, greatest_end: Array, seqlen_k: int
) -> tuple[Array, Array]:
    """(begin, end) of the rows that see each key of a monotone plane, [batch, heads, seqlen_k]."""
    key = jnp.broadcast_to(_numbers(seqlen_k, 3), (*greatest_begin.shape[:2], seqlen_k))
    begin, end = (_count(x, key) for x in (greatest_end, greatest_begin))
    seen = begin < end
    return jnp.where(seen, begin, 0), jnp.where(seen, end, 0)


def _groups_that_reach(of_rows: Array, options: VisibilityOptions) -> Array:
    """[batch, heads, groups of keys, 4]: for each group of keys the bounds of those rows whose
    group reaches into it."""
    begin = GROUP * _numbers(groups(options.seqlen_k), 4).swapaxes(2, 3)
    end = jnp.minimum(begin + GROUP, options.seqlen_k)
    row = GROUP * _numbers(groups(options.seqlen_q), 4)
    least_begin, greatest_end = (of_rows[..., None, :, i] for i in (0, 3))
    reaches = (least_begin < end) & (greatest_end > begin)
    first = jnp.where(reaches, row, NONE).min(-1, initial=NONE)
    last = jnp.where(reaches, row + GROUP, 0).max(-1, initial=0)
    last = jnp.minimum(last, options.seqlen_q)
    return jnp.stack([first, jnp.full_like(first, NONE), jnp.zeros_like(last), last], -1)


def _count(array: Array, limits: Array) -> Array:
    """How many elements of an array [..., n] that never falls are at most each of [..., m]: by
    halving, which has no loop, since a loop's state must vary over the mesh axes that they do."""
    count = jnp.zeros_like(limits)
    n = array.shape[-1]
    step = 1 << n.bit_length()
    while step := step >> 1:
        tried = count + step
        at = jnp.clip(tried - 1, 0, max(n - 1, 0))
        found = jnp.take_along_axis(array, at, axis=-1, mode="clip")
        count = jnp.where((tried <= n) & (found <= limits), tried, count)
    return count


def _numbers(count: int, ndim: int) -> Array:
    """int32 [1, ..., count]."""
    return jnp.arange(count, dtype=jnp.int32).reshape((1,) * (ndim - 1) + (count,))


def _part(x: Array) -> Array:
    """[batch, heads, ...] as whole words."""
    x = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    return jnp.pad(x, ((0, 0), (0, 0), (0, whole(x.shape[-1]) - x.shape[-1])))
