"""Which keys a row sees: everything that gives the mask of a call its meaning.

A row sees a key that is inside the window around the row's own position, where both are inside of
their sequences' lengths and a dense mask is True. The rows and keys that one device works
with may be parts of a sequence: then windows and positions are moved to where the part stands.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa3.flex.functions import Functions
from jax_fa3.flex.operands import FlexOperands
from jax_fa3.operands import Counts, Operands
from jax_fa3.options import MAX_SEQLEN, UNBOUNDED, AttentionOptions
from jax_fa3.visibility.table import Plane


def visible(
    options: AttentionOptions, operands: Operands, row: jax.Array, column: jax.Array
) -> jax.Array | None:
    """[b | 1, h | 1, q | 1, k | 1]; None where every row sees every key.

    row: int32 [q], the numbers of all query rows; column: int32 [k], those of some keys, to
    which the operands' arrays of keys belong.
    """
    position = positions(options, operands, row)
    row, column = row[None, None, :, None], column[None, None, None, :]
    terms = []
    if operands.key_lengths is not None:
        terms.append(column < _by_sequence(operands.key_lengths))
    if operands.query_lengths is not None:
        terms.append(row < _by_sequence(operands.query_lengths))
    if options.window_left < UNBOUNDED:
        terms.append(column >= position - options.window_left)
    if options.window_right < UNBOUNDED:
        terms.append(column <= position + options.window_right)
    if operands.visibility is not None:
        begin, end = Plane(operands.visibility).rows(row.shape[2])
        terms += [column >= begin[..., None], column < end[..., None]]
    if operands.mask is not None:
        terms.append(operands.mask)
    if options.functions is not None:
        terms.append(_by_functions(options.functions, operands, row, column))
    terms = [term for term in terms if term is not None]
    if not terms:
        return None
    return functools.reduce(jnp.logical_and, terms)


def _by_functions(
    functions: Functions, operands: FlexOperands, row: jax.Array, column: jax.Array
) -> jax.Array | None:
    """What the mask function and its blocks let see, if there is one."""
    return functions.visible(
        operands.batch_number,
        operands.head_number,
        row.reshape(-1),
        column.reshape(-1),
        tuple(operands.captured.values()),
        operands.block_states,
    )


def positions(options: AttentionOptions, operands: Operands, row: jax.Array) -> jax.Array:
    """int32 [b | 1, 1, q, 1]: where the rows of these numbers, int32 [q], stand among the keys."""
    row = row[None, None, :, None]
    if operands.query_offset is None:
        return row + options.query_offset
    return row + _by_sequence(_legal_offset(operands.query_offset))


def _by_sequence(x: jax.Array) -> jax.Array:
    """[b] -> [b, 1, 1, 1]."""
    return x[:, None, None, None]


def within_sight(operands: Operands) -> Operands:
    """The operands with lengths that end at the last row that sees a key, and at the last key that
    a row sees, as far as the table of visibility tells."""
    if operands.visibility is None:
        return operands
    batch, plane = operands.query.shape[0], Plane(operands.visibility)

    def ending(lengths, ends):
        ends = jnp.broadcast_to(ends.max(1), (batch,))
        return ends if lengths is None else jnp.minimum(lengths, ends)

    return operands.replace(
        query_lengths=ending(operands.query_lengths, plane.rows_end),
        key_lengths=ending(operands.key_lengths, plane.keys_end),
    )


def within_window(options: AttentionOptions, operands: Operands) -> Operands:
    """The operands with lengths that end at the last key that the window lets a row see. What
    stands behind, such as the unwritten part of a cache, is then padding."""
    if options.window_right == UNBOUNDED:
        return operands
    n, rows, offset = operands.extents, operands.query_lengths, operands.query_offset
    rows = n.seqlen_q if rows is None else jnp.minimum(rows, n.seqlen_q)
    ends = rows + (options.query_offset if offset is None else _legal_offset(offset))
    ends += options.window_right
    if isinstance(ends, int) and isinstance(n.seqlen_k, int) and ends >= n.seqlen_k:
        return operands
    ends = jnp.broadcast_to(jnp.asarray(ends, jnp.int32), (n.batch,))
    lengths = operands.key_lengths
    return operands.replace(key_lengths=ends if lengths is None else jnp.minimum(lengths, ends))


def is_row(operands: Operands, seqlen_q: int) -> jax.Array | None:
    """bool [b | 1, h | 1, q]: whether a row is no padding, that is before its sequence's length and
    not behind the last row of its head that the table of visibility lets see a key; None where
    there is no padding."""
    lengths, ends = operands.query_lengths, None
    if operands.visibility is not None:
        ends = Plane(operands.visibility).rows_end
    if lengths is not None:
        ends = lengths[:, None] if ends is None else jnp.minimum(lengths[:, None], ends)
    if ends is None:
        return None
    return jnp.arange(seqlen_q, dtype=jnp.int32)[None, None] < ends[..., None]


def is_illegal(operands: Operands, seqlen_q: int) -> jax.Array | None:
    """bool [b, h | 1, q]: rows whose segment ids break their rule; None where none can."""
    if operands.visibility is None:
        return None
    is_illegal = ~Plane(operands.visibility).is_valid[..., None]
    if operands.query_lengths is None:
        return jnp.broadcast_to(is_illegal, (*is_illegal.shape[:2], seqlen_q))
    return is_illegal & inside(operands.query_lengths, seqlen_q)[:, None]


def inside(lengths: jax.Array, count: int, start: jax.Array | int = 0) -> jax.Array:
    """bool [b, count]: whether the rows from `start` on stand before their sequence's end."""
    return start + jnp.arange(count, dtype=jnp.int32)[None] < lengths[:, None]


def has_window(options: AttentionOptions) -> bool:
    """Whether it matters to who sees whom where a row stands among the keys."""
    return min(options.window) < UNBOUNDED


def has_positions(options: AttentionOptions, operands: Operands) -> bool:
    """Whether it matters to anything where a row stands among the keys."""
    return has_window(options) or operands.alibi_slopes is not None


def is_triangular(options: AttentionOptions) -> bool:
    """Whether rows see all keys up to one near their own position, so that later rows see more."""
    return options.window_left == UNBOUNDED > options.window_right


def is_causal_alone(options: AttentionOptions, operands: Operands) -> bool:
    """Whether rows see the keys up to their own position, and nothing else but the keys' lengths
    has a say, nor do positions in scores. An array that is not named here may have one."""
    return (
        options.window_left == UNBOUNDED
        and options.window_right == options.query_offset == 0
        and operands.present().keys() <= {"query", "key", "value", "key_lengths", "sinks"}
    )


def is_by_length(options: AttentionOptions, operands: Operands) -> bool:
    """Whether nothing but lengths has a say in what rows see, wherever they stand, and positions
    none in scores."""
    known = {"query", "key", "value", "query_lengths", "key_lengths", "query_offset", "sinks"}
    return not has_window(options) and operands.present().keys() <= known


def reach(options: AttentionOptions) -> int:
    """How many keys more than its own position a row's window covers."""
    return options.window_left + options.window_right


def without_window(options: AttentionOptions) -> AttentionOptions:
    return dataclasses.replace(
        options, window_left=UNBOUNDED, window_right=UNBOUNDED, query_offset=0
    )


class Seen(NamedTuple):
    """What the window lets rows see of some keys; an entry for each device."""

    some: np.ndarray  # some row sees some key
    all: np.ndarray  # every row sees every key


def seen(options: AttentionOptions, offsets: np.ndarray, num_rows: int, num_keys: int) -> Seen:
    """Of keys from whose first the first row stands `offsets` to the right."""
    left, right = options.window
    # Columns that the last row is right of the first key, and the first row of the last key.
    most, least = offsets + num_rows - 1, offsets - (num_keys - 1)
    return Seen((most + right >= 0) & (least <= left), (most <= left) & (least + right >= 0))


def recounted(counts: Counts, x: jax.Array, start: jax.Array) -> jax.Array:
    """Positions or distances, counted from `start` instead of 0; negative before it."""
    return (_legal_offset(x) if counts == "diagonal" else jnp.maximum(x, 0)) - start


def _legal_offset(offset: jax.Array) -> jax.Array:
    return jnp.clip(offset, -MAX_SEQLEN, MAX_SEQLEN)
