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
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa3 import mask
from jax_fa3.context_parallel.layout import Packed, Part, balanced, chunk_table, pack, unpack
from jax_fa3.context_parallel.pieces import (
    WITHOUT_SINKS,
    Chunks,
    Partials,
    Piece,
    Piecewise,
    all_pieces,
    held,
    keys_of,
    merge,
    total,
)
from jax_fa3.operands import Operands, Outputs
from jax_fa3.options import UNBOUNDED, AttentionOptions


def forward(part: Part, options: AttentionOptions, operands: Operands) -> Outputs:
    ring = _Ring(part, options, operands)
    keys = ring.packed_keys
    outs = Partials(ring.queries, merge)
    for visit in ring.visits:
        (here,) = keys.unpacked()
        if visit.onward:
            keys = keys.each(functools.partial(part.axis.shift, distance=visit.onward))
        for piece in visit.pieces:
            outs.add(piece.queries, ring.forward(piece, here.present()))
    return ring.outputs_of(outs)


def backward(
    part: Part,
    options: AttentionOptions,
    operands: Operands,
    outputs: Outputs,
    cotangents: Outputs,
) -> Operands:
    ring, axis = _Ring(part, options, operands, outputs, cotangents), part.axis
    keys = ring.packed_keys
    dqueries = Partials(ring.queries, total)
    own = travelling = None  # gradients of keys and values, packed, float32
    for visit in ring.visits:
        (here,) = keys.unpacked()
        if visit.onward:
            keys = keys.each(functools.partial(axis.shift, distance=visit.onward))
        dkeys = Partials(ring.keys, total)
        for piece in visit.pieces:
            of_queries, of_keys = ring.backward(piece, here.present())
            dqueries.add(piece.queries, of_queries)
            dkeys.add(piece.keys, of_keys)
        grads = ring.join(dkeys)
        if visit.distance == 0:
            own = grads
        else:
            travelling = grads if travelling is None else travelling + grads
            travelling = axis.shift(travelling, visit.onward or axis.size - visit.distance)
    key, value = operands.key, operands.value
    sums = (own if travelling is None else own + travelling).astype(key.dtype)
    dkey, dvalue = unpack(ring.restore(sums, -3), key, value)
    return ring.gradients_of(dqueries, dkey, dvalue)


class _Visit(NamedTuple):
    """A stay of the keys of the device `distance` before this one, and how far they go next."""

    distance: int
    pieces: list[Piece]
    onward: int  # 0: nowhere


class _Ring(Piecewise):
    """A device's rows against the keys of one device after the other."""

    def __init__(self, part: Part, options: AttentionOptions, operands: Operands, *rest: Outputs):
        size, seqlens = part.axis.size, operands.extents[1:3]
        order = balanced(part.layout, options, size, *seqlens)
        table = chunk_table(order, size)
        chunks = (Chunks.of(table, n) for n in seqlens)
        super().__init__(part, order, *chunks, operands, *rest)
        keys = Packed.of(operands.only(keys_of(operands)))
        self.packed_keys = keys.along(self.axis.mirror) if order == "mirrored" else keys
        halves = order != "contiguous" and seqlens[0] == seqlens[1]
        causal = halves and mask.is_causal_alone(options, operands)
        pieces_of = _causal_pieces if causal else _any_pieces
        found = [pieces_of(self, options, distance) for distance in range(size)]
        distances = [distance for distance in range(size) if found[distance]]
        nexts = [*distances[1:], distances[-1]]
        self.visits = [
            _Visit(distance, found[distance], following - distance)
            for distance, following in zip(distances, nexts, strict=True)
        ]

    def join(self, partials: Partials) -> jax.Array:
        """Gradients of key and value by chunk, packed like them; zeros where no piece gave any."""
        n, chunks = self.operands.extents, []
        for grads in partials.results():
            if grads is None:
                shape = (n.batch, self.keys.rows, n.num_heads_kv)
                dims = (n.head_dim, n.head_dim_v)
                grads = (jnp.zeros((*shape, dim), jnp.float32) for dim in dims)
            chunks.append(pack(*grads))
        return jnp.concatenate(chunks, -3)


def _any_pieces(ring: _Ring, options: AttentionOptions, distance: int) -> list[Piece]:
    return all_pieces(ring, options, ring.keys.held_by(distance), own=distance == 0)


def _causal_pieces(ring: _Ring, options: AttentionOptions, distance: int) -> list[Piece]:
    """The one piece of a visit where rows and keys are a low and a high chunk (see above). Only
    for what mask.is_causal_alone knows."""
    axis, queries, keys = ring.axis, ring.queries, ring.keys.held_by(distance)
    recount = held(axis, queries, keys)
    if distance == 0:
        return [Piece((0, 1), (0, 1), options, recount, {})]
    before = keys.starts[0] < queries.starts[0]
    rows = axis.pick(np.where(before, 2, 1) * queries.rows)
    seen = axis.pick(np.where(before, 1, 2) * keys.rows)
    lengths = ring.operands.key_lengths
    if lengths is not None:
        seen = jnp.minimum(seen, recount("keys", lengths))
    options = dataclasses.replace(options, window_right=UNBOUNDED)
    given = dict(query_lengths=rows, key_lengths=seen) | WITHOUT_SINKS
    return [Piece((1, 0), (0, 1), options, recount, given)]
