"""Strategy "ring": keys and values travel around the devices, a part at a time.

    forward     N - 1 permutes of K and V together        [+ Q, KV; O and LSE mirrored]
    backward    the same, and N - 1 of dK and dV          [+ Q, O, dO and LSE, KV; gradients]
                in float32, which go with the keys of
                the visit after the next one

At the visit of distance i a device holds the keys of the i-th device before it. Visits that no
device needs are passed over, in one permute of a greater distance. While a visit's pieces run, the
keys of the next one arrive, and so do the gradients of the keys of the one before; only the last
gradients come home alone. A device's gradients for its own keys stay at home.

Where attention is causal and nothing else, devices hold a low and a high chunk of the sequence,
and all work is one of

    own keys       (low, high) x (low, high), causal
    keys before    (low, high) x (low)           of a device whose low chunk comes earlier
    keys after           (high) x (low, high)

so that the visits of others' keys are one call without a mask, of equal size on every device.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_fa3 import mask
from jax_fa3.context_parallel.layout import Packed, Part, balanced, chunk_table
from jax_fa3.context_parallel.pieces import (
    WITHOUT_SINKS,
    Chunks,
    Partials,
    Piece,
    Piecewise,
    all_pieces,
    beside,
    held,
    joined,
    keys_of,
    merge,
    total,
)
from jax_fa3.operands import Operands, Outputs
from jax_fa3.options import UNBOUNDED, AttentionOptions


def forward(part: Part, options: AttentionOptions, operands: Operands) -> Outputs:
    ring = _Ring(part, options, operands)
    keys, outs = ring.own_keys, Partials(ring.queries, merge)
    for visit in ring.visits:
        results = [ring.forward(piece, keys) for piece in visit.pieces]
        results, arriving = beside(results, ring.sent(visit, keys))
        keys, _ = ring.received(visit, arriving)
        for piece, result in zip(visit.pieces, results, strict=True):
            outs.add(piece.queries, result)
    return ring.outputs_of(outs)


def backward(
    part: Part,
    options: AttentionOptions,
    operands: Operands,
    outputs: Outputs,
    cotangents: Outputs,
) -> Operands:
    ring = _Ring(part, options, operands, outputs, cotangents)
    dqueries = Partials(ring.queries, total)
    keys, own, travelling = ring.own_keys, None, None
    for visit in ring.visits:
        results = [ring.backward(piece, keys) for piece in visit.pieces]
        results, arriving = beside(results, ring.sent(visit, keys, travelling))
        keys, travelling = ring.received(visit, arriving)
        dkeys = Partials(ring.keys, total)
        for piece, result in zip(visit.pieces, results, strict=True):
            dqueries.add(piece.queries, result.only(["query"]))
            dkeys.add(piece.keys, result.only(["key", "value"]))
        gradients = ring.whole(dkeys)
        if visit.distance == 0:
            own = gradients
        else:
            travelling = total([x for x in (travelling, gradients) if x is not None])
    if travelling is not None:
        home = part.axis.shift(Packed.of(travelling), part.axis.size - ring.visits[-1].distance)
        own = total([own, *home.unpacked()])
    own = own.map(lambda _, x: x.astype(operands.key.dtype))
    return ring.gradients_of(dqueries, ring.restored(own))


class _Visit(NamedTuple):
    """A stay of the keys of the device `distance` before this one, and how far they go next."""

    distance: int
    pieces: list[Piece]
    since: int  # from the visit before
    onward: int  # 0: nowhere


class _Ring(Piecewise):
    """A device's rows against the keys of one device after the other."""

    def __init__(self, part: Part, options: AttentionOptions, operands: Operands, *rest: Outputs):
        size, seqlens = part.axis.size, operands.extents[1:3]
        order = balanced(part.layout, options, operands, size, *seqlens)
        table = chunk_table(order, size)
        chunks = (Chunks.of(table, n) for n in seqlens)
        super().__init__(part, order, *chunks, operands, *rest)
        (self.own_keys,) = self.reordered(keys_of(operands))
        halves = order != "contiguous" and seqlens[0] == seqlens[1]
        causal = halves and mask.is_causal_alone(options, operands)
        pieces_of = _causal_pieces if causal else _any_pieces
        found = [pieces_of(self, options, distance) for distance in range(size)]
        distances = [distance for distance in range(size) if found[distance]]
        steps = np.diff(distances).tolist()
        self.visits = [
            _Visit(distance, found[distance], since, onward)
            for distance, since, onward in zip(distances, [0, *steps], [*steps, 0], strict=True)
        ]

    def sent(
        self, visit: _Visit, keys: Operands, gradients: Operands | None = None
    ) -> dict[int, Packed]:
        """What arrives during a visit, by how far it travels: the keys of the next one, and the
        gradients of the keys of the one before. Those that go the same way go together.
        """
        loads = defaultdict(list)
        if visit.onward:
            loads[visit.onward].append(keys)
        if gradients is not None:
            loads[visit.since].append(gradients)
        return {
            distance: self.axis.shift(Packed.of(*load), distance)
            for distance, load in loads.items()
        }

    def received(
        self, visit: _Visit, arrived: dict[int, Packed]
    ) -> tuple[Operands | None, Operands | None]:
        """The keys and gradients of `sent`."""
        loads = {distance: list(packed.unpacked()) for distance, packed in arrived.items()}
        keys = loads[visit.onward].pop(0) if visit.onward else None
        gradients = loads.get(visit.since)
        return keys, gradients.pop() if gradients else None

    def whole(self, partials: Partials) -> Operands:
        """Gradients of all keys and values, in float32; zeros where no piece gave any."""
        n, chunks = self.operands.extents, []
        for grads in partials.results():
            if grads is None:
                shape = (n.batch, self.keys.rows, n.num_heads_kv)
                widths = (n.head_dim, n.head_dim_v)
                key, value = (jnp.zeros((*shape, width), jnp.float32) for width in widths)
                grads = Operands(key=key, value=value)
            chunks.append(grads)
        return joined(chunks)


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
