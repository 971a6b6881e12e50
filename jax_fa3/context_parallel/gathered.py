"""All keys and values gathered first, for masks and slopes that need their places (allgather.py).

Gathered keys stand in natural order, so a device's rows are attended to as on a single device,
with an offset. No kernel runs beside the exchanges.

Stripes of rows have no offset in common: what a window lets them see is in a table of visibility.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import lax

from jax_fa3 import mask
from jax_fa3.context_parallel.layout import (
    Part,
    balanced,
    chunk_table,
    in_layout,
    stripe_table,
    whole,
)
from jax_fa3.context_parallel.pieces import (
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
from jax_fa3.context_parallel.sight import with_window
from jax_fa3.operands import Operands, Outputs
from jax_fa3.options import AttentionOptions


def forward(part: Part, options: AttentionOptions, operands: Operands) -> Outputs:
    work = _Gathered(part, options, operands)
    keys, outs = work.gather(operands), Partials(work.queries, merge)
    for piece in work.pieces:
        outs.add(piece.queries, work.forward(piece, keys))
    return work.outputs_of(outs)


def backward(part: Part, options: AttentionOptions, operands: Operands, *rest: Outputs) -> Operands:
    work = _Gathered(part, options, operands, *rest)
    keys = work.gather(operands)
    dqueries, dkeys = Partials(work.queries, total), Partials(work.keys, total)
    for piece in work.pieces:
        gradients = work.backward(piece, keys)
        dqueries.add(piece.queries, gradients.only(["query"]))
        dkeys.add(piece.keys, gradients.only(["key", "value"]))
    (shares,) = dkeys.results()
    sums = shares.map(lambda _, x: work.scatter(x).astype(operands.key.dtype))
    return work.gradients_of(dqueries, sums)


class _Gathered(Piecewise):
    """A device's rows against the whole sequence of keys."""

    def __init__(self, part: Part, options: AttentionOptions, operands: Operands, *rest: Outputs):
        size, n = part.axis.size, operands.extents
        self.layout = part.layout
        order = balanced(part.layout, options, operands, size, n.seqlen_q)
        queries = Chunks.of(chunk_table(order, size), n.seqlen_q)
        keys = Chunks(np.zeros((1, size), int), n.seqlen_k * size)
        if part.layout != "striped":
            super().__init__(part, order, queries, keys, operands, *rest)
            self.pieces = all_pieces(self, options, keys, own=True)
            return
        stripes = Chunks.of(stripe_table(n.seqlen_q, size), n.seqlen_q)
        super().__init__(part, order, queries, keys, operands, *rest, stands=stripes)
        self.sight = with_window(self.sight, options, operands, stripes.positions(self.axis))
        recount, given = held(self.axis, stripes, keys), dict(query_offset=None)
        self.pieces = [Piece((0,), (0,), mask.without_window(options), recount, given)]

    def gather(self, operands: Operands) -> Operands:
        """The arrays of key rows of the whole sequence."""
        name, layout = self.axis.name, self.layout
        return keys_of(operands).map(lambda row, x: whole(x, row.axis("t"), name, layout))

    def scatter(self, x: jax.Array) -> jax.Array:
        """The sum over all devices of x [batch, whole sequence, ...], this device's rows of it."""
        if x.shape[1] == 0:
            return x
        x = in_layout(x, 1, self.axis.size, self.layout)
        return lax.psum_scatter(x, self.axis.name, scatter_dimension=1, tiled=True)
