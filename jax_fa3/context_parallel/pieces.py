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
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fa3 import mask
from jax_fa3.context_parallel.layout import Axis, Order, Packed, Part
from jax_fa3.context_parallel.sight import Sight
from jax_fa3.operands import Bundle, Counts, Operands, Outputs, Row
from jax_fa3.options import AttentionOptions
from jax_fa3.varying import vary_together

# Partial results that are kept before they are summed. Summing each one as it comes reads and
# writes a float32 sum every time; keeping all of them takes the memory of the whole sequence.
KEPT = 5

WITHOUT_SINKS = {"sinks": None}  # given to all pieces of a chunk of queries but one


class Chunks(NamedTuple):
    """A device's rows of one kind: equal chunks, and where they stand in the sequence."""

    starts: np.ndarray  # [chunk, device]: position of each chunk's first row
    rows: int  # of one chunk

    @classmethod
    def of(cls, table: np.ndarray, seqlen: int) -> Chunks:
        """Chunks that hold `seqlen` rows together, with the global numbers in `table`."""
        rows = seqlen // len(table)
        return cls(table * rows, rows)

    def at(self, chosen: tuple[int, ...]) -> Chunks:
        """Some of the chunks."""
        return self._replace(starts=self.starts[list(chosen)])

    def held_by(self, distance: int) -> Chunks:
        """The chunks of the device `distance` before each one, around the ring."""
        return self._replace(starts=np.roll(self.starts, distance, axis=1))

    def positions(self, axis: Axis) -> jax.Array:
        """int32 [rows of all chunks]: where this device's rows stand."""
        of_chunk = jnp.arange(self.rows, dtype=jnp.int32)[None]
        return (axis.pick(self.starts)[:, None] + of_chunk).reshape(-1)


class Piece(NamedTuple):
    """One call: local chunks of queries and of keys, in the order they are given, and its mask."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    options: AttentionOptions
    recount: Callable[[Counts, jax.Array], jax.Array]  # positions in the sequence to the piece's
    given: dict[str, jax.Array | None]  # int32 [] each, in place of the call's arrays


def piece(
    work: Piecewise,
    options: AttentionOptions,
    keys: Chunks,
    i: int,
    j: int,
    *,
    always: bool = False,
) -> Piece | None:
    """Query chunk i against key chunk j; None where no device sees anything, unless `always`."""
    axis, given = work.axis, {}
    first = dict(queries=work.queries.starts[i], keys=keys.starts[j])
    first["diagonal"] = first["keys"] - first["queries"]
    if work.operands.query_offset is None:
        offsets = options.query_offset - first["diagonal"]
        seen = mask.seen(options, offsets, work.queries.rows, keys.rows)
        if not (always or seen.some.any()):
            return None
        if seen.all.all() and work.operands.alibi_slopes is None:
            options = mask.without_window(options)
        elif (offsets == offsets[0]).all():
            options = dataclasses.replace(options, query_offset=int(offsets[0]))
        else:
            options = dataclasses.replace(options, query_offset=0)
            given["query_offset"] = axis.pick(offsets)

    def recount(counts, x):
        return mask.recounted(counts, x, axis.pick(first[counts]))

    return Piece((i,), (j,), options, recount, given)


def all_pieces(
    work: Piecewise, options: AttentionOptions, keys: Chunks, *, own: bool
) -> list[Piece]:
    """All rows against all keys where positions do not matter; else every chunk of queries against
    every chunk of keys that some device's rows see.

    With `own` each chunk has a piece, needed or not: one that sees nothing gives the zeros that
    belong there. It is also the one of the chunk's pieces that has the sinks.
    """
    queries = work.queries
    if not mask.has_positions(options, work.operands):
        chunks = (tuple(range(len(x.starts))) for x in (queries, keys))
        options = mask.without_window(options)
        given = dict(query_offset=None) | ({} if own else WITHOUT_SINKS)
        return [Piece(*chunks, options, held(work.axis, queries, keys), given)]
    found = []
    for i in range(len(queries.starts)):
        for j in range(len(keys.starts)):
            first = own and i % len(keys.starts) == j
            this = piece(work, options, keys, i, j, always=first)
            if this is not None:
                found.append(this if first else this._replace(given=this.given | WITHOUT_SINKS))
    return found


def held(axis: Axis, queries: Chunks, keys: Chunks) -> Callable[[Counts, jax.Array], jax.Array]:
    """Positions in the sequence to numbers of the rows before them that a device holds, since its
    chunks stand in the order of the sequence."""

    def recount(counts, x):
        chunks = dict(queries=queries, keys=keys)[counts]
        starts = axis.pick(chunks.starts).reshape((1,) * x.ndim + (-1,))
        parts = mask.recounted(counts, x[..., None], starts)
        return jnp.clip(parts, 0, chunks.rows).sum(-1, dtype=jnp.int32)

    return recount


def keys_of(operands: Operands) -> Operands:
    """The arrays that are divided with the key rows."""
    return _dividing("keys", operands)


def rows_of(bundle: Bundle) -> Bundle:
    """The arrays that are divided with the query rows."""
    return _dividing("queries", bundle)


def _dividing(rows, bundle):
    return bundle.only([name for name, row in bundle.rows().items() if row.splits == rows])


class Piecewise:
    """A device's share of the work in the order it is done in; runs pieces of it. `stands`: where
    its rows do, if these are more chunks than pieces take apart.

    What has no rows, the largest logits and gradients as those of sinks, does not go with the
    results of a piece: it is kept here until all pieces are done.
    """

    def __init__(
        self,
        part: Part,
        order: Order,
        queries: Chunks,
        keys: Chunks,
        operands: Operands,
        *rest: Outputs,
        stands: Chunks | None = None,
    ):
        self.local, self.axis, self.order = part.local, part.axis, order
        self.queries, self.keys = queries, keys
        self.operands, *self.rest = self._with_rows(operands, *rest)
        self.sight, seqlen_q = None, self.axis.size * operands.extents.seqlen_q
        if operands.visibility is not None:
            positions = (stands or queries).positions(self.axis)
            self.sight = Sight.of(operands.visibility, seqlen_q, positions)
        # Of the pieces so far; gradients by name.
        self.max_logits: list[jax.Array] = []
        self.shares: dict[str, list[jax.Array]] = defaultdict(list)

    def _with_rows(self, *bundles: Bundle) -> tuple[Bundle, ...]:
        """The bundles with the query rows that this device works on in place of its own."""
        pairs = zip(bundles, self.reordered(*map(rows_of, bundles)), strict=True)
        return tuple(bundle.replace(**rows.present()) for bundle, rows in pairs)

    def reordered(self, *bundles: Bundle) -> tuple[Bundle, ...]:
        """Arrays of this device's rows to those of the rows that it works on."""
        if self.order != "mirrored":
            return bundles
        mirror = functools.partial(self.axis.mirror, dim=-3)
        return jax.tree.map(mirror, Packed.of(*bundles)).unpacked()

    def restored(self, results: Bundle) -> Bundle:
        """Results for the rows worked on to those for this device's."""
        if self.order != "mirrored":
            return results
        back = functools.partial(self.axis.unmirror, dim=-3)
        return jax.tree.map(back, Packed.of(results)).unpacked()[0]

    def forward(self, piece: Piece, keys: Bundle) -> Outputs:
        """The outputs for the rows of a piece; `keys` has the arrays of key rows."""
        outputs = self.local.forward(piece.options, self._operands(piece, keys))
        if outputs.max_logits is not None:
            self.max_logits.append(outputs.max_logits)
        return rows_of(outputs)

    def backward(self, piece: Piece, keys: Bundle) -> Operands:
        """The gradients of the rows and keys of a piece."""
        take = functools.partial(self._take, piece)
        rest = (x.map(take) for x in self.rest)
        gradients = self.local.backward(piece.options, self._operands(piece, keys), *rest)
        shares = _dividing(None, gradients).present()
        for name, share in shares.items():
            self.shares[name].append(share)
        return gradients.replace(**dict.fromkeys(shares))

    def outputs_of(self, partials: Partials) -> Outputs:
        """The merged outputs of this device's rows, and the largest logits of its pieces."""
        merged = joined(partials.results())
        out = merged.out.astype(self.operands.query.dtype)
        outputs = self.restored(merged.replace(out=out))
        if not self.max_logits:
            return outputs
        return outputs.replace(max_logits=functools.reduce(jnp.maximum, self.max_logits))

    def gradients_of(self, dqueries: Partials, dkeys: Operands) -> Operands:
        """The gradients of this device's arrays, with its shares of those of arrays without rows;
        `dkeys` has those of its keys."""
        gradient = joined(dqueries.results())
        dquery = gradient.query.astype(self.operands.query.dtype)
        dquery = self.restored(gradient.replace(query=dquery)).query
        shares = {name: sum(parts) for name, parts in self.shares.items()}
        return dkeys.replace(query=dquery, **shares)

    def _operands(self, piece: Piece, keys: Bundle) -> Operands:
        """The arrays of a piece: of its rows and keys, positions counted from where these start."""
        given = {
            name: None if x is None else jnp.broadcast_to(x, self.operands.query.shape[:1])
            for name, x in piece.given.items()
        }

        def of_piece(row, x):
            x = self._take(piece, row, x)
            return piece.recount(row.counts, x) if row.counts else x

        operands = self.operands.replace(**keys.present() | dict.fromkeys(given))
        operands = operands.replace(visibility=None).map(of_piece).replace(**given)
        if self.sight is not None:
            sight = vary_together(self.sight.map(of_piece))
            made = sight.table(self.local, piece.options.routes.backward, operands.extents)
            operands = operands.replace(visibility=made)
        return vary_together(operands)

    def _take(self, piece: Piece, row: Row, x: jax.Array) -> jax.Array:
        """The rows of a piece, one chunk after the other."""
        if row.splits is None:
            return x
        chosen, chunks = {
            "queries": (piece.queries, self.queries),
            "keys": (piece.keys, self.keys),
        }[row.splits]
        if chosen == tuple(range(len(chunks.starts))):
            return x
        axis = row.axis("st")
        parts = jnp.split(x, len(chunks.starts), axis)
        return jnp.concatenate([parts[i] for i in chosen], axis)


class Partials:
    """Partial results of each chunk, combined in float32 when there are KEPT of them."""

    def __init__(self, chunks: Chunks, combine: Callable[[list[Bundle]], Bundle]):
        self.parts: list[list[Bundle]] = [[] for _ in chunks.starts]
        self.combine = combine

    def add(self, chunks: tuple[int, ...], results: Bundle) -> None:
        """Results for the rows of some chunks, one after the other."""
        for chunk, result in zip(chunks, divided(results, len(chunks)), strict=True):
            if len(self.parts[chunk]) == KEPT:
                # Without the barrier XLA fuses all of a chunk's sums into one after the last piece.
                self.parts[chunk] = [lax.optimization_barrier(self.combine(self.parts[chunk]))]
            self.parts[chunk].append(result)

    def results(self) -> list[Bundle | None]:
        """The combined result of each chunk; None for a chunk without partial results."""
        return [self.combine(parts) if parts else None for parts in self.parts]


def divided(bundle: Bundle, count: int) -> list[Bundle]:
    """`count` equal parts of the rows of all arrays."""

    def part(i):
        return bundle.map(lambda row, x: jnp.split(x, count, row.axis("st"))[i])

    return [part(i) for i in range(count)]


def joined(parts: list[Bundle]) -> Bundle:
    """The bundle of all the rows in `parts`."""
    first, *others = parts
    return first.map(lambda row, *x: jnp.concatenate(x, row.axis("st")), *others)


def merge(parts: list[Outputs]) -> Outputs:
    """The outputs for disjoint sets of keys to those for their union; out in float32."""
    if len(parts) == 1:
        return parts[0]
    lses = [x.lse for x in parts]
    lse = jax.nn.logsumexp(jnp.stack(lses), axis=0)
    origin = jnp.where(lse == -jnp.inf, 0, lse)
    weights = (jnp.exp(x - origin).swapaxes(1, 2)[..., None] for x in lses)
    weighted = (weight * x.out for weight, x in zip(weights, parts, strict=True))
    return Outputs(functools.reduce(operator.add, weighted), lse)


def total(parts: list[Operands]) -> Operands:
    """The float32 sum of gradients."""
    return jax.tree.map(lambda *x: sum(y.astype(jnp.float32) for y in x), *parts)


def beside(results: Any, arriving: Any) -> tuple[Any, Any]:
    """What kernels give and what exchanges bring while they run, both there when both are.

    XLA by itself starts an exchange when its operands are there and waits for it as soon as it
    has nothing else to do, with the kernels still to come. What is done next needs what this
    function returns, so that the exchange has only these kernels to run beside. By default XLA has
    one exchange under way at a time: give each exchange kernels of its own.
    """
    return lax.optimization_barrier((results, arriving))
