"""Attention of some of the rows a device holds against some of the keys: the pieces that a strategy
is made of, and their sums.

A Piece is one call of an operation on one device. Its mask is the global one moved to where
its rows and keys stand, as tight as it can be told when the program is traced: no mask where every
device sees all of it, a static offset where all devices agree, an offset in an array otherwise;
and no piece at all where no device sees any of it. The kernels skip what a mask leaves out.

A partial result is rounded to the input dtype by the kernel; sums of partial results are float32.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fa3.calls import Operations
from jax_fa3.context.layout import Axis, Order, pack, unpack, vary_together
from jax_fa3.options import MAX_SEQLEN, UNBOUNDED, AttentionOptions, Dense, Index

# Partial results that are kept before they are summed. Summing each one as it comes reads and
# writes a float32 sum every time; keeping all of them takes the memory of the whole sequence.
KEPT = 5


class Chunks(NamedTuple):
    """A device's rows of one kind: equal chunks, and where they stand in the sequence."""

    starts: np.ndarray  # [chunk, device]: position of each chunk's first row
    rows: int  # of one chunk

    @classmethod
    def of(cls, table: np.ndarray, seqlen: int) -> Chunks:
        """Chunks that hold `seqlen` rows together, with the global numbers in `table`."""
        rows = seqlen // len(table)
        return cls(table * rows, rows)

    def held_by(self, distance: int) -> Chunks:
        """The chunks of the device `distance` before each one, around the ring."""
        return self._replace(starts=np.roll(self.starts, distance, axis=1))


class Piece(NamedTuple):
    """One call: local chunks of queries and of keys, in the order they are given, and its mask."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    options: AttentionOptions
    index: Index


def piece(
    axis: Axis,
    options: AttentionOptions,
    index: Index,
    queries: Chunks,
    keys: Chunks,
    i: int,
    j: int,
    *,
    always: bool = False,
) -> Piece | None:
    """Query chunk i against key chunk j; None where no device sees anything, unless `always`."""
    first_query, first_key = queries.starts[i], keys.starts[j]
    shift = first_query - first_key
    if options.has_query_offset:
        offset = jnp.clip(index.query_offset, -MAX_SEQLEN, MAX_SEQLEN) + axis.pick(shift)
    else:
        offsets = options.query_offset + shift
        left, right = options.window_left, options.window_right
        # Columns that the last row is right of the first key, and the first row of the last key.
        most, least = offsets + queries.rows - 1, offsets - (keys.rows - 1)
        seen = (most + right >= 0) & (least <= left)
        whole = (most <= left) & (least + right >= 0)
        if not (always or seen.any()):
            return None
        if whole.all():
            unbounded = dict(window_left=UNBOUNDED, window_right=UNBOUNDED, query_offset=0)
            options, offset = dataclasses.replace(options, **unbounded), None
        elif (offsets == offsets[0]).all():
            options, offset = dataclasses.replace(options, query_offset=int(offsets[0])), None
        else:
            options = dataclasses.replace(options, query_offset=0, has_query_offset=True)
            offset = axis.pick(offsets)
    lengths = (
        None if length is None else local_length(length, axis.pick(first))
        for length, first in zip(index[:2], (first_query, first_key), strict=True)
    )
    return Piece((i,), (j,), options, Index(*lengths, offset))


def all_pieces(
    axis: Axis,
    options: AttentionOptions,
    index: Index,
    queries: Chunks,
    keys: Chunks,
    *,
    own: bool,
) -> list[Piece]:
    """All rows against all keys where there is no window; else every chunk of queries against every
    chunk of keys that some device's rows see.

    With `own` each chunk has a piece, needed or not: one that sees nothing gives the zeros that
    belong there.
    """
    if min(options.window_left, options.window_right) == UNBOUNDED:
        options = dataclasses.replace(options, query_offset=0, has_query_offset=False)
        lengths = (
            None if length is None else held_length(axis, length, chunks)
            for length, chunks in zip(index[:2], (queries, keys), strict=True)
        )
        all_queries, all_keys = (tuple(range(len(x.starts))) for x in (queries, keys))
        return [Piece(all_queries, all_keys, options, Index(*lengths))]
    pairs = [(i, j) for i in range(len(queries.starts)) for j in range(len(keys.starts))]
    found = (
        piece(axis, options, index, queries, keys, i, j, always=own and i % len(keys.starts) == j)
        for i, j in pairs
    )
    return [x for x in found if x is not None]


def local_length(length: jax.Array, start: jax.Array) -> jax.Array:
    """A global length seen from `start`: negative where the sequence ends before it."""
    return jnp.maximum(length, 0) - start


def held_length(axis: Axis, length: jax.Array, chunks: Chunks) -> jax.Array:
    """How many of a device's rows are inside of a sequence of this global length: the first ones,
    since its chunks stand in the order of the sequence.
    """
    parts = (local_length(length, axis.pick(start)) for start in chunks.starts)
    return sum(jnp.clip(part, 0, chunks.rows) for part in parts)


class Rows(NamedTuple):
    """What goes with query rows: the last four in the backward pass only."""

    query: jax.Array  # [batch, seqlen_q, num_heads_q, head_dim]
    out: jax.Array | None = None  # [batch, seqlen_q, num_heads_q, head_dim_v]
    lse: jax.Array | None = None  # [batch, num_heads_q, seqlen_q]
    dout: jax.Array | None = None  # as out
    dlse: jax.Array | None = None  # as lse

    def mirror(self, axis: Axis) -> Rows:
        """Each array through `Axis.mirror`, those of one kind in one exchange."""
        full = [x for x in (self.query, self.out, self.dout) if x is not None]
        full = unpack(axis.mirror(pack(*full), -3), *full)
        if self.lse is None:
            return Rows(*full)
        stats = [x for x in (self.lse, self.dlse) if x is not None]
        stats = axis.mirror(jnp.stack(stats), -1)
        query, out, dout = full
        return Rows(query, out, stats[0], dout, None if self.dlse is None else stats[1])


class Piecewise:
    """A device's share of the work in the order it is done in; runs pieces of it."""

    def __init__(self, local: Operations, axis: Axis, order: Order, queries: Chunks, keys: Chunks):
        self.local, self.axis, self.order = local, axis, order
        self.queries, self.keys = queries, keys

    def reorder(self, rows: Rows) -> Rows:
        """This device's rows to those it works on."""
        return rows.mirror(self.axis) if self.order == "mirrored" else rows

    def restore(self, x: jax.Array, dim: int) -> jax.Array:
        """A result for the rows worked on to that for this device's, along dimension `dim`."""
        return self.axis.unmirror(x, dim) if self.order == "mirrored" else x

    def forward(self, piece: Piece, rows: Rows, key: jax.Array, value: jax.Array) -> Iterable:
        """(out, lse) for each of the piece's query chunks."""
        query, key, value, index = self._operands(piece, rows, key, value)
        out, lse = self.local.forward(piece.options, query, key, value, index, Dense())
        count = len(piece.queries)
        return zip(jnp.split(out, count, 1), jnp.split(lse, count, 2), strict=True)

    def backward(
        self, piece: Piece, rows: Rows, key: jax.Array, value: jax.Array
    ) -> tuple[Iterable, Iterable]:
        """dquery for each of the piece's query chunks, (dkey, dvalue) for each key chunk."""
        query, key, value, index = self._operands(piece, rows, key, value)
        out, dout = (self._rows(piece, x, 1) for x in (rows.out, rows.dout))
        lse, dlse = (self._rows(piece, x, 2) for x in (rows.lse, rows.dlse))
        dquery, dkey, dvalue, _ = self.local.backward(
            piece.options, query, key, value, out, lse, dout, dlse, index, Dense()
        )
        count = len(piece.keys)
        dkeys = zip(jnp.split(dkey, count, 1), jnp.split(dvalue, count, 1), strict=True)
        return jnp.split(dquery, len(piece.queries), 1), dkeys

    def outputs(self, partials: Partials, dtype) -> tuple[jax.Array, jax.Array]:
        """The merged out and lse of this device's rows."""
        outs, lses = zip(*partials.results(), strict=True)
        out = jnp.concatenate(outs, 1).astype(dtype)
        return self.restore(out, -3), self.restore(jnp.concatenate(lses, 2), -1)

    def dquery(self, partials: Partials, dtype) -> jax.Array:
        """The summed gradient of this device's query."""
        return self.restore(jnp.concatenate(partials.results(), 1).astype(dtype), -3)

    def _operands(self, piece, rows, key, value):
        query = self._rows(piece, rows.query, 1)
        key, value = (_take(x, piece.keys, len(self.keys.starts), 1) for x in (key, value))
        index = jax.tree.map(lambda x: jnp.broadcast_to(x, query.shape[:1]), piece.index)
        return vary_together((query, key, value, index))

    def _rows(self, piece, x, dim):
        return None if x is None else _take(x, piece.queries, len(self.queries.starts), dim)


class Partials:
    """Partial results of each chunk, combined in float32 when there are KEPT of them."""

    def __init__(self, chunks: Chunks, combine: Callable[[list], Any]):
        self.parts: list[list] = [[] for _ in chunks.starts]
        self.combine = combine

    def add(self, chunks: tuple[int, ...], results: Iterable) -> None:
        for chunk, result in zip(chunks, results, strict=True):
            if len(self.parts[chunk]) == KEPT:
                # Without the barrier XLA fuses all of a chunk's sums into one after the last piece.
                self.parts[chunk] = [lax.optimization_barrier(self.combine(self.parts[chunk]))]
            self.parts[chunk].append(result)

    def results(self) -> list:
        """The combined result of each chunk; None for a chunk without partial results."""
        return [self.combine(parts) if parts else None for parts in self.parts]


def merge(parts: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of disjoint sets of keys to that of their union; out in float32."""
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    lse = jax.nn.logsumexp(jnp.stack(lses), axis=0)
    origin = jnp.where(lse == -jnp.inf, 0, lse)
    weights = (jnp.exp(x - origin).swapaxes(1, 2)[..., None] for x in lses)
    return functools.reduce(operator.add, map(operator.mul, weights, outs)), lse


def total(parts: list) -> Any:
    """The float32 sum of equal trees of arrays."""
    return jax.tree.map(lambda *x: sum(y.astype(jnp.float32) for y in x), *parts)


def _take(x: jax.Array, chosen: tuple[int, ...], num_chunks: int, dim: int) -> jax.Array:
    """The chosen ones of x's chunks along `dim`, one after the other."""
    if chosen == tuple(range(num_chunks)):
        return x
    chunks = jnp.split(x, num_chunks, dim)
    return jnp.concatenate([chunks[i] for i in chosen], dim)
