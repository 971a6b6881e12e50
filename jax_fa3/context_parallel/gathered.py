"""All keys and values gathered first, for masks and slopes that need their places (allgather.py).

Gathered keys stand in natural order, so a device's rows are attended to as on a single device,
with an offset. No kernel runs beside the exchanges.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import lax

from jax_fa3.context_parallel.layout import (
    Part,
    balanced,
    chunk_table,
    zigzag_permute,
    zigzag_unpermute,
)
from jax_fa3.context_parallel.pieces import (
    Chunks,
    Partials,
    Piecewise,
    all_pieces,
    keys_of,
    merge,
    total,
)
from jax_fa3.operands import Operands, Outputs
from jax_fa3.options import AttentionOptions


def forward(part: Part, options: AttentionOptions, operands: Operands) -> Outputs:
    work = _Gathered(part, options, operands)
    whole, outs = work.gather(operands), Partials(work.queries, merge)
    for piece in work.pieces:
        outs.add(piece.queries, work.forward(piece, whole))
    return work.outputs_of(outs)


def backward(part: Part, options: AttentionOptions, operands: Operands, *rest: Outputs) -> Operands:
    work = _Gathered(part, options, operands, *rest)
    whole = work.gather(operands)
    dqueries, dkeys = Partials(work.queries, total), Partials(work.keys, total)
    for piece in work.pieces:
        gradients = work.backward(piece, whole)
        dqueries.add(piece.queries, gradients.only(["query"]))
        dkeys.add(piece.keys, gradients.only(["key", "value"]))
    (shares,) = dkeys.results()
    sums = shares.map(lambda _, x: work.scatter(x).astype(operands.key.dtype))
    return work.gradients_of(dqueries, sums)


class _Gathered(Piecewise):
    """A device's rows against the whole sequence of keys."""

    def __init__(self, part: Part, options: AttentionOptions, operands: Operands, *rest: Outputs):
        size, n = part.axis.size, operands.extents
        order = balanced(part.layout, options, size, n.seqlen_q)
        queries = Chunks.of(chunk_table(order, size), n.seqlen_q)
        keys = Chunks(np.zeros((1, size), int), n.seqlen_k * size)
        super().__init__(part, order, queries, keys, operands, *rest)
        self.pieces = all_pieces(self, options, keys, own=True)

    def gather(self, operands: Operands) -> Operands:
        """The arrays of key rows of the whole sequence."""
        return keys_of(operands).map(lambda row, x: self._whole(x, row.axis("t")))

    def _whole(self, x, dim):
        if x.shape[dim] == 0:  # which XLA refuses
            return x
        x = lax.all_gather(x, self.axis.name, axis=dim, tiled=True)
        return zigzag_unpermute(x, dim, self.axis.size) if self.order == "zigzag" else x

    def scatter(self, x: jax.Array) -> jax.Array:
        """The sum over all devices of x [batch, whole sequence, ...], this device's rows of it."""
        if x.shape[1] == 0:
            return x
        if self.order == "zigzag":
            x = zigzag_permute(x, 1, self.axis.size)
        return lax.psum_scatter(x, self.axis.name, scatter_dimension=1, tiled=True)
