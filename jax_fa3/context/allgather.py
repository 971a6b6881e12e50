"""Strategy "allgather": each device gathers all keys and values and attends with its own queries.

    forward     all_gather K, V                            [+ Q, O, LSE mirrored]
    backward    all_gather K, V; reduce_scatter dK, dV     [+ Q, O, dO, LSE, dQ mirrored]

Gathered keys stand in natural order, so a device's rows are attended to as on a single device,
with an offset. Gradients of keys and values are summed over devices in float32.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import lax

from jax_fa3.calls import Operations
from jax_fa3.context.layout import (
    Axis,
    Layout,
    balanced,
    chunk_table,
    zigzag_permute,
    zigzag_unpermute,
)
from jax_fa3.context.pieces import Chunks, Partials, Piecewise, Rows, all_pieces, merge, total
from jax_fa3.options import AttentionOptions, Index


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
    work = _Gathered(local, axis, layout, options, query, key, index)
    rows, whole = work.reorder(Rows(query)), work.gather(key, value)
    outs = Partials(work.queries, merge)
    for piece in work.pieces:
        outs.add(piece.queries, work.forward(piece, rows, *whole))
    return work.outputs(outs, query.dtype)


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
    work = _Gathered(local, axis, layout, options, query, key, index)
    rows, whole = work.reorder(Rows(query, out, lse, dout, dlse)), work.gather(key, value)
    dqueries, dkeys = Partials(work.queries, total), Partials(work.keys, total)
    for piece in work.pieces:
        of_queries, of_keys = work.backward(piece, rows, *whole)
        dqueries.add(piece.queries, of_queries)
        dkeys.add(piece.keys, of_keys)
    dkey, dvalue = (work.scatter(x).astype(key.dtype) for x in dkeys.results()[0])
    return work.dquery(dqueries, query.dtype), dkey, dvalue


class _Gathered(Piecewise):
    """A device's rows against the whole sequence of keys."""

    def __init__(self, local, axis, layout, options, query, key, index):
        order = balanced(layout, options, axis.size, query.shape[1])
        queries = Chunks.of(chunk_table(order, axis.size), query.shape[1])
        keys = Chunks(np.zeros((1, axis.size), int), key.shape[1] * axis.size)
        super().__init__(local, axis, order, queries, keys)
        self.pieces = all_pieces(axis, options, index, queries, keys, own=True)

    def gather(self, *arrays):
        """Arrays [batch, seqlen_k, ...] of this device to those of the whole sequence."""
        if arrays[0].shape[1] == 0:  # which XLA refuses
            return arrays
        whole = (lax.all_gather(x, self.axis.name, axis=1, tiled=True) for x in arrays)
        if self.order == "zigzag":
            whole = (zigzag_unpermute(x, 1, self.axis.size) for x in whole)
        return list(whole)

    def scatter(self, x):
        """The sum over all devices of x [batch, whole sequence, ...], this device's rows of it."""
        if x.shape[1] == 0:
            return x
        if self.order == "zigzag":
            x = zigzag_permute(x, 1, self.axis.size)
        return lax.psum_scatter(x, self.axis.name, scatter_dimension=1, tiled=True)
