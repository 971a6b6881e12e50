"""Strategy "ring": keys and values travel around the devices, a part at a time.

    forward     N - 1 permutes of K and V together                     [+ Q, KV, O, LSE mirrored]
    backward    the same, and N - 1 permutes of dK and dV in float32   [+ their gradients too]

At the visit of distance i a device holds the keys of the i-th device before it. Visits that no
device needs are passed over, in one permute of a greater distance. Each permute is independent of
the pieces computed next to it in the program, so that XLA can run them at the same time: keys leave
for the next visit before they are used, and the gradients of a visit's keys arrive while the next
ones are computed. A device's gradients for its own keys stay at home.

Where attention is causal and nothing else, devices hold a low and a high chunk of the sequence,
and all work is one of

    own keys       (low, high) x (low, high), causal
    keys before    (low, high) x (low)           of a device whose low chunk comes earlier
    keys after           (high) x (low, high)

so that the visits of others' keys are one call without a mask, of equal size on every device.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa3.calls import Operations
from jax_fa3.context.layout import Axis, Layout, balanced, chunk_table, pack, unpack
from jax_fa3.context.pieces import (
    Chunks,
    Partials,
    Piece,
    Piecewise,
    Rows,
    all_pieces,
    held_length,
    merge,
    total,
)
from jax_fa3.options import UNBOUNDED, AttentionOptions, Index


def forward(
    local: Operations,
    axis: Axis,
    layout: Layout,
    options: AttentionOptions,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: Index,
) -> tuple[jax.Array, jax.Array]:
    ring = _Ring(local, axis, layout, options, query, key, index)
    rows, keys = ring.reorder(Rows(query)), ring.restack(key, value)
    outs = Partials(ring.queries, merge)
    for visit in ring.visits:
        here = unpack(keys, key, value)
        if visit.onward:
            keys = axis.shift(keys, visit.onward)
        for piece in visit.pieces:
            outs.add(piece.queries, ring.forward(piece, rows, *here))
    return ring.outputs(outs, query.dtype)


def backward(
    local: Operations,
    axis: Axis,
    layout: Layout,
    options: AttentionOptions,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
    index: Index,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    ring = _Ring(local, axis, layout, options, query, key, index)
    rows, keys = ring.reorder(Rows(query, out, lse, dout, dlse)), ring.restack(key, value)
    dqueries = Partials(ring.queries, total)
    own = travelling = None  # gradients of keys and values, packed, float32
    for visit in ring.visits:
        here = unpack(keys, key, value)
        if visit.onward:
            keys = axis.shift(keys, visit.onward)
        dkeys = Partials(ring.keys, total)
        for piece in visit.pieces:
            of_queries, of_keys = ring.backward(piece, rows, *here)
            dqueries.add(piece.queries, of_queries)
            dkeys.add(piece.keys, of_keys)
        grads = ring.join(dkeys, key, value)
        if visit.distance == 0:
            own = grads
        else:
            travelling = grads if travelling is None else travelling + grads
            travelling = axis.shift(travelling, visit.onward or axis.size - visit.distance)
    total_grads = (own if travelling is None else own + travelling).astype(key.dtype)
    dkey, dvalue = unpack(ring.restore(total_grads, -3), key, value)
    return ring.dquery(dqueries, query.dtype), dkey, dvalue


class _Visit(NamedTuple):
    """A stay of the keys of the device `distance` before this one, and how far they go next."""

    distance: int
    pieces: list[Piece]
    onward: int  # 0: nowhere


class _Ring(Piecewise):
    """A device's rows against the keys of one device after the other."""

    def __init__(self, local, axis, layout, options, query, key, index):
        seqlens = query.shape[1], key.shape[1]
        order = balanced(layout, options, axis.size, *seqlens)
        table = chunk_table(order, axis.size)
        super().__init__(local, axis, order, *(Chunks.of(table, n) for n in seqlens))
        halves = order != "contiguous" and seqlens[0] == seqlens[1]
        pieces_of = _causal_pieces if halves and _only_causal(options) else _any_pieces
        found = [pieces_of(self, options, index, distance) for distance in range(axis.size)]
        distances = [distance for distance in range(axis.size) if found[distance]]
        nexts = [*distances[1:], distances[-1]]
        self.visits = [
            _Visit(distance, found[distance], following - distance)
            for distance, following in zip(distances, nexts, strict=True)
        ]

    def restack(self, key, value):
        """Keys and values as they travel, in the order of the rows."""
        keys = pack(key, value)
        return self.axis.mirror(keys, -3) if self.order == "mirrored" else keys

    def join(self, partials, key, value):
        """Gradients of key and value by chunk, packed like them; zeros where no piece gave any."""
        chunks = []
        for grads in partials.results():
            if grads is None:
                shape = (key.shape[0], self.keys.rows, key.shape[2])
                grads = (jnp.zeros((*shape, x.shape[3]), jnp.float32) for x in (key, value))
            chunks.append(pack(*grads))
        return jnp.concatenate(chunks, -3)


def _only_causal(options: AttentionOptions) -> bool:
    """Rows see the keys up to their own position; query lengths, which would leave holes where
    high and low chunks follow each other, are not given."""
    return (
        options.window_left == UNBOUNDED
        and options.window_right == options.query_offset == 0
        and not options.has_query_offset
        and not options.has_query_lengths
    )


def _any_pieces(ring: _Ring, options, index, distance) -> list[Piece]:
    keys = ring.keys.held_by(distance)
    return all_pieces(ring.axis, options, index, ring.queries, keys, own=distance == 0)


def _causal_pieces(ring: _Ring, options, index, distance) -> list[Piece]:
    """The one piece of a visit where rows and keys are a low and a high chunk (see above)."""
    axis, keys = ring.axis, ring.keys.held_by(distance)
    lengths = None if index.key_lengths is None else held_length(axis, index.key_lengths, keys)
    if distance == 0:
        return [Piece((0, 1), (0, 1), options, Index(key_lengths=lengths))]
    before = keys.starts[0] < ring.queries.starts[0]
    rows = axis.pick(np.where(before, 2, 1) * ring.queries.rows)
    seen = axis.pick(np.where(before, 1, 2) * keys.rows)
    seen = seen if lengths is None else jnp.minimum(seen, lengths)
    options = dataclasses.replace(
        options, window_right=UNBOUNDED, has_query_lengths=True, has_key_lengths=True
    )
    return [Piece((1, 0), (0, 1), options, Index(rows, seen))]
