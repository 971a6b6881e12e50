"""Strategy "allgather": each device attends with its own queries to its own keys, and to those of
all other devices when it has gathered them.

    forward     all_gather K, V                              [+ rows of Q, O, LSE traded]
    backward    all_gather K, V; reduce_scatter dK, dV       [+ rows of Q, O, dO, LSE, dQ traded]

Own keys are attended to beside the exchanges. Of the others, in the order of the sequence, a row
without a mask or under a causal one sees the first, as many as a length says. Any other mask is
taken with an offset over all gathered keys, and so are slopes; keys have to be there first:
gathered.py.

Where attention is causal and nothing else, a device has two chunks of rows, and its own work is

                   keys 0    keys 1
    rows 0         causal
    rows 1         all       causal

In layout "zigzag" the work with others' keys is equal too. Of contiguous rows the second chunk is
traded for that of device N - 1 - rank while others' keys are attended to: the chunks 2r and
2(N - 1 - r) + 1 see the keys of r and of N - 1 - r other devices.

Gradients of keys and values are summed over devices in float32.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fa3 import mask
from jax_fa3.context_parallel import gathered
from jax_fa3.context_parallel.layout import Packed, Part, chunk_table
from jax_fa3.context_parallel.pieces import (
    WITHOUT_SINKS,
    Chunks,
    Partials,
    Piece,
    Piecewise,
    beside,
    divided,
    held,
    joined,
    keys_of,
    merge,
    rows_of,
    total,
)
from jax_fa3.operands import Operands, Outputs
from jax_fa3.options import AttentionOptions

KEYS = "key", "value"


def forward(part: Part, options: AttentionOptions, operands: Operands) -> Outputs:
    if not _is_apart(part, options, operands):
        return gathered.forward(part, options, operands)
    work = _Apart(part, options, operands)
    outs = Partials(work.queries, merge)

    def meanwhile(exchange):
        """What has arrived when the next piece of own work is done; what follows comes later."""
        piece = own_pieces.pop(0)
        result = work.forward(piece, work.own_keys)
        result, (arrived, work.own_keys) = beside(result, (exchange, work.own_keys))
        outs.add(piece.queries, result)
        return arrived

    own_pieces = work.own_pieces(3 if work.trades else 1)
    if work.trades:
        partner = work.partner(meanwhile(work.trade()))
    others = work.in_order(meanwhile(work.gather()))
    results = [work.forward(piece, others) for piece in work.pieces]
    if work.trades:
        given = partner.forward(work.partner_piece, others)
        (given, results), work.own_keys = beside((given, results), work.own_keys)
        outs.add((1,), *meanwhile(part.axis.reflect(Packed.of(given))).unpacked())
    for piece, result in zip(work.pieces, results, strict=True):
        outs.add(piece.queries, result)
    return work.outputs_of(outs)


def backward(
    part: Part,
    options: AttentionOptions,
    operands: Operands,
    outputs: Outputs,
    cotangents: Outputs,
) -> Operands:
    if not _is_apart(part, options, operands):
        return gathered.backward(part, options, operands, outputs, cotangents)
    work = _Apart(part, options, operands, outputs, cotangents)
    dqueries, dkeys = Partials(work.queries, total), Partials(work.keys, total)

    def meanwhile(exchange):
        """As in `forward`."""
        piece = own_pieces.pop(0)
        gradients = work.backward(piece, work.own_keys)
        gradients, (arrived, work.own_keys) = beside(gradients, (exchange, work.own_keys))
        dqueries.add(piece.queries, gradients.only(["query"]))
        dkeys.add(piece.keys, gradients.only(KEYS))
        return arrived

    own_pieces = work.own_pieces(3 if work.trades else 2)
    if work.trades:
        partner = work.partner(meanwhile(work.trade()))
    others = work.in_order(meanwhile(work.gather()))
    shares = []  # of the gradients of others' keys
    if work.trades:
        given = partner.backward(work.partner_piece, others)
        shares.append(given.only(KEYS))
        back = part.axis.reflect(Packed.of(given.only(["query"])))
    results = [work.backward(piece, others) for piece in work.pieces]
    if work.trades:
        results, back = beside(results, back)
        dqueries.add((1,), *back.unpacked())
    for piece, gradients in zip(work.pieces, results, strict=True):
        dqueries.add(piece.queries, gradients.only(["query"]))
        shares.append(gradients.only(KEYS))
    shares, work.own_keys = beside(shares, work.own_keys)
    received = work.scatter(total(shares))
    if own_pieces:  # else rows are not in chunks
        received = meanwhile(received)
    sums = total([joined(dkeys.results()), *received.unpacked()])
    sums = sums.map(lambda _, x: x.astype(operands.key.dtype))
    return work.gradients_of(dqueries, sums)


def _is_apart(part: Part, options: AttentionOptions, operands: Operands) -> bool:
    """Whether lengths say what rows see of others' keys, and there are others and rows."""
    n = operands.extents
    causal = n.seqlen_q == n.seqlen_k and mask.is_causal_alone(options, operands)
    some = part.axis.size > 1 and n.seqlen_q * n.seqlen_k > 0 and part.layout != "striped"
    return some and (causal or mask.is_by_length(options, operands))


class _Apart(Piecewise):
    """A device's rows against its own keys, and against those of others in the order of the
    sequence.

    trades          whether the second chunk of rows is traded for another device's
    pieces          this device's rows against others' keys; the first chunk alone, if it trades
    partner_piece   the rows that came for the second chunk
    """

    def __init__(self, part: Part, options: AttentionOptions, operands: Operands, *rest: Outputs):
        size, n = part.axis.size, operands.extents
        self.part, self.options, self.is_causal = part, options, mask.has_window(options)
        self.own_keys = keys_of(operands)
        order = part.layout
        if order == "contiguous" and n.seqlen_q % 2 == 0:
            order = "halves"
        table = chunk_table(order if self.is_causal else part.layout, size)
        queries = Chunks.of(chunk_table(order, size), n.seqlen_q)
        super().__init__(part, order, queries, Chunks.of(table, n.seqlen_k), operands, *rest)
        self.trades = self.is_causal and order == "halves"
        # Contiguous causal rows see others' keys before their own; this device's own ones may stand
        # there for the partner's rows, which see them.
        self.with_own = self.is_causal and part.layout == "contiguous"
        self.slots = _slots(table, self.with_own)
        if not self.is_causal:
            self.pieces = [self._beyond(tuple(range(len(queries.starts))), None)]
            return
        seen = [
            start if self.with_own else start - i * queries.rows
            for i, start in enumerate(queries.starts)
        ]
        self.pieces = [self._beyond((i,), x) for i, x in enumerate(seen)]
        if self.trades:
            self.pieces, self.partner_piece = self.pieces[:1], self._beyond((0,), seen[0][::-1])

    def own_pieces(self, count: int) -> list[Piece]:
        """This device's rows against its own keys, in `count` pieces where they come in chunks."""
        rows, keys = (tuple(range(len(x.starts))) for x in (self.queries, self.keys))
        if len(rows) == 1 or count == 1:
            pairs = [(rows, keys)]
        elif not self.is_causal:
            pairs = [((0,), keys), ((1,), keys)]
        elif count == 2:
            pairs = [((0,), (0,)), ((1,), (0, 1))]
        else:
            pairs = [((0,), (0,)), ((1,), (0,)), ((1,), (1,))]
        return [self._own(*pair) for pair in pairs]

    def _own(self, rows, keys):
        options, recount = self.options, held(self.axis, self.queries.at(rows), self.keys.at(keys))
        if not self.is_causal:
            return Piece(rows, keys, mask.without_window(options), recount, dict(query_offset=None))
        if max(keys) < min(rows):
            return Piece(rows, keys, mask.without_window(options), recount, WITHOUT_SINKS)
        if len(keys) > len(rows):
            options = dataclasses.replace(options, query_offset=self.queries.rows)
        return Piece(rows, keys, options, recount, {})

    def _beyond(self, rows, seen):
        """The rows of some chunks against the first `seen` of others' keys, by device, or all."""
        own = held(self.axis, self.queries.at(rows), self.keys)
        length, given = self.operands.key_lengths, dict(query_offset=None) | WITHOUT_SINKS
        if length is not None and not self.with_own:
            whole = self.axis.size * self.operands.extents.seqlen_k
            length = jnp.clip(length, 0, whole) - own("keys", length)
        counts = [] if seen is None else [self.axis.pick(seen)]
        counts += [] if length is None else [length]
        if counts:
            given["key_lengths"] = functools.reduce(jnp.minimum, counts)
        keys = tuple(range(len(self.keys.starts)))
        return Piece(rows, keys, mask.without_window(self.options), own, given)

    def trade(self) -> Packed:
        """The second chunk of rows of device N - 1 - rank."""
        rows = (divided(rows_of(x), 2)[1] for x in (self.operands, *self.rest))
        return self.axis.reflect(Packed.of(*rows))

    def partner(self, traded: Packed) -> Piecewise:
        """The work with those rows. Their largest logits count among this device's, of which the
        maximum over devices is taken."""
        bundles = zip((self.operands, *self.rest), traded.unpacked(), strict=True)
        bundles = (bundle.replace(**rows.present()) for bundle, rows in bundles)
        partner = Piecewise(self.part, self.order, self.queries.at((0,)), self.keys, *bundles)
        partner.max_logits = self.max_logits
        return partner

    def gather(self) -> Packed:
        """Every device's keys, in a new leading dimension."""
        packed = Packed.of(self.own_keys)
        return jax.tree.map(lambda x: lax.all_gather(x, self.axis.name), packed)

    def in_order(self, arrived: Packed) -> Operands:
        """Others' keys in the order of the sequence."""
        (keys,) = jax.vmap(Packed.unpacked)(arrived)

        def ordered(x):
            chunks = jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, self.keys.rows, *x.shape[3:])
            if not _is_in_order(self.slots, chunks.shape[1]):
                chunks = jnp.take(chunks, self.axis.pick(self.slots), axis=1, mode="clip")
            return chunks.reshape(x.shape[1], -1, *x.shape[3:])

        return keys.map(lambda _, x: ordered(x))

    def scatter(self, shares: Operands) -> Packed:
        """The sum over devices of their shares of the gradients of this device's keys."""
        size, chunks_held = self.axis.size, len(self.keys.starts)

        def by_device(x):
            chunks = x.reshape(x.shape[0], len(self.slots), self.keys.rows, *x.shape[2:])
            index = np.full((size * chunks_held, size), len(self.slots))  # out of bounds: zeros
            np.put_along_axis(index, self.slots, np.arange(len(self.slots))[:, None], axis=0)
            if not _is_in_order(self.slots, len(index)):
                index = self.axis.pick(index)
                chunks = jnp.take(chunks, index, axis=1, mode="fill", fill_value=0)
            parts = chunks.reshape(x.shape[0], size, -1, *x.shape[2:])
            return jnp.moveaxis(parts, 1, 0)

        packed = jax.vmap(Packed.of)(shares.map(lambda _, x: by_device(x)))
        return jax.tree.map(lambda x: lax.psum_scatter(x, self.axis.name), packed)


def _is_in_order(slots: np.ndarray, count: int) -> bool:
    """Whether these are all of `count` chunks, in their order on every device."""
    return len(slots) == count and (slots.T == np.arange(count)).all()


def _slots(table: np.ndarray, with_own: bool) -> np.ndarray:
    """[chunk, device]: where the chunks of others, in the order of the sequence, stand among those
    of all devices, one device after the other; `table` has the numbers of a device's chunks."""
    slots = np.argsort(table.T.ravel())
    numbers = range(table.size)
    return np.stack(
        [[slots[i] for i in numbers if with_own or i not in own] for own in table.T], axis=1
    )
