"""Strategy "ulysses": sequence parts are exchanged for heads (arXiv:2309.14509).

    forward     all_to_all of Q, K, V; of O, LSE
    backward    all_to_all of Q, K, V, O, LSE, dO; of dQ, dK, dV

Each device attends to the whole sequence with its share of the query heads. Key/value heads that
several devices need are repeated before the exchange, and their gradients summed after it, in
float32.

A device's heads come in groups, as many as its key/value heads allow, one after the other: beside
the kernel of one group, the next one's arrays arrive and the last one's results leave, all in one
exchange. The first group's arrays and the last group's results travel alone.

Arrays of heads without rows are whole on every device: they do not travel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jax_fa3.context_parallel.layout import (
    Part,
    by_row,
    from_row,
    in_layout,
    in_order,
    pack,
    unpack,
    whole,
)
from jax_fa3.context_parallel.pieces import beside
from jax_fa3.operands import Bundle, Operands, Outputs, Row
from jax_fa3.options import AttentionOptions

# Groups of heads at most. Each one is a kernel call; the first one's exchanges are not hidden.
GROUPS = 4


def forward(part: Part, options: AttentionOptions, operands: Operands) -> Outputs:
    def attend(operands):
        return part.local.forward(options, operands)

    return _by_groups(_Exchange(part, operands), attend, operands, absent=-jnp.inf)


def backward(
    part: Part,
    options: AttentionOptions,
    operands: Operands,
    outputs: Outputs,
    cotangents: Outputs,
) -> Operands:
    def pull_back(*bundles):
        return part.local.backward(options, *bundles)

    bundles = operands, outputs, cotangents
    return _by_groups(_Exchange(part, operands), pull_back, *bundles, absent=0)


def _by_groups(
    exchange: _Exchange, attend: Callable[..., Bundle], *bundles: Bundle, absent: float
) -> Bundle:
    """This device's rows of attend(*bundles), with all heads; of what has no rows, `absent` for the
    heads of other devices."""
    bundles = [bundle.map(exchange.gather) for bundle in bundles]
    waiting = [exchange.to_heads(group, bundles) for group in range(exchange.groups)]
    arriving, waiting = beside(exchange.swap(waiting[0]), waiting)
    here = unpack(arriving, *waiting.pop(0))
    leaving, returned, staying = [], [], []
    for group in range(exchange.groups):
        following = waiting.pop(0) if waiting else []
        sent = [*following, *leaving]
        results = attend(*exchange.whole_sequences(group, here, bundles))
        results, (arriving, waiting) = beside(results, (exchange.swap(sent), waiting))
        arrived = unpack(arriving, *sent) if sent else []
        here = arrived[: len(following)]
        if leaving:
            returned.append(arrived[len(following) :])
        leaving = exchange.to_rows(results)
        staying.append(results)
    returned.append(unpack(exchange.swap(leaving), *leaving))
    return exchange.all_heads(staying, returned, absent)


class _Exchange:
    """Arrays of part of the sequence with all heads, to the whole with some heads, and back.

    They travel as [device, batch, elements], the device they go to or come from.
    """

    def __init__(self, part: Part, operands: Operands):
        self.axis, self.layout = part.axis, part.layout
        n = operands.extents
        if n.num_heads_q % self.axis.size:
            raise ValueError(
                f"query has {n.num_heads_q} heads; expected a multiple of the {self.axis.size} "
                f"devices of mesh axis {self.axis.name!r}, over which strategy 'ulysses' divides "
                "them (the strategies 'ring' and 'allgather' take any number)"
            )
        group = n.num_heads_q // n.num_heads_kv
        # The largest groups that divide both a device's query heads and those of a key/value head.
        self.repeats = group // math.gcd(group, n.num_heads_q // self.axis.size)
        heads = n.num_heads_kv * self.repeats // self.axis.size
        self.groups = max(count for count in range(1, GROUPS + 1) if heads % count == 0)

    def gather(self, row: Row, x: jax.Array) -> jax.Array:
        """Whole sequences of an array that has rows and no heads."""
        if row.axis("st") is None or row.axis("hk") is not None:
            return x
        return whole(x, row.axis("st"), self.axis.name, self.layout)

    def swap(self, arrays: Sequence[jax.Array]) -> jax.Array | None:
        """What the devices have for each other of these arrays, packed."""
        if not arrays:
            return None
        packed = pack(*arrays)
        axis = packed.ndim - arrays[0].ndim
        return lax.all_to_all(packed, self.axis.name, axis, axis, tiled=True)

    def to_heads(self, group: int, bundles: Sequence[Bundle]) -> list[jax.Array]:
        """The arrays of one group of heads of each device, to be sent there."""

        def sent(row, x):
            x = by_row(row, x)
            if "k" in row.dims:
                x = jnp.repeat(x, self.repeats, axis=2)
            batch, rows, heads, width = x.shape
            count = heads // (self.axis.size * self.groups)
            x = x.reshape(batch, rows, self.axis.size, self.groups, count * width)
            x = jnp.moveaxis(x[:, :, :, group], 2, 0)
            return x.reshape(self.axis.size, batch, rows * count * width)

        return [sent(row, x) for bundle in bundles for row, x in self._exchanged(bundle)]

    def whole_sequences(
        self, group: int, arrays: Sequence[jax.Array], bundles: Sequence[Bundle]
    ) -> list[Bundle]:
        """Bundles with what has arrived from all devices for a group of this one's heads, and with
        these heads of what is whole here."""
        arrays = iter(arrays)

        def received(row, x):
            if not _is_exchanged(row):
                return x if row.axis("hk") is None else self._heads_of(group, x)
            batch, rows, heads, width = by_row(row, x).shape
            if "k" in row.dims:
                heads *= self.repeats
            count = heads // (self.axis.size * self.groups)
            parts = jnp.moveaxis(next(arrays), 0, 1)
            parts = parts.reshape(batch, self.axis.size * rows, count, width)
            return from_row(row, in_order(parts, 1, self.axis.size, self.layout))

        return [bundle.map(received) for bundle in bundles]

    def to_rows(self, results: Bundle) -> list[jax.Array]:
        """Results for a group of heads, to be sent to the devices whose rows they are of."""

        def sent(row, x):
            size = self.axis.size
            x = in_layout(by_row(row, x), 1, size, self.layout)
            batch, rows, count, width = x.shape
            x = x.reshape(batch, size, rows // size * count * width)
            return jnp.moveaxis(x, 1, 0)

        return [sent(row, x) for row, x in self._exchanged(results)]

    def all_heads(
        self, results: Sequence[Bundle], returned: Sequence[Sequence[jax.Array]], absent: float
    ) -> Bundle:
        """The results of all groups: those with rows came back as arrays, those without stayed,
        and are `absent` for the heads of other devices."""
        first, *others = results
        by_array = zip(*returned, strict=True)

        def joined(row, x, *following):
            if not _is_exchanged(row):
                return self._among_all([x, *following], absent)
            batch, rows, count, width = by_row(row, x).shape
            rows //= self.axis.size
            groups = jnp.stack(next(by_array))  # [group, device, batch, elements]
            groups = groups.reshape(*groups.shape[:2], batch, rows, count, width)
            heads = groups.transpose(2, 3, 1, 0, 4, 5)
            heads = heads.reshape(batch, rows, self.axis.size * self.groups * count, width)
            return from_row(row, self._sum_repeats(heads) if "k" in row.dims else heads)

        return first.map(joined, *others)

    def _heads_of(self, group, x):
        """This device's heads of a group, of x [batch, query heads or 1 for all, ...]."""
        batch, heads, *rest = x.shape
        if heads == 1:
            return x
        count = heads // (self.axis.size * self.groups)
        x = x.reshape(batch, self.axis.size, self.groups, count, *rest)
        return lax.dynamic_index_in_dim(x, self.axis.rank, 1, keepdims=False)[:, group]

    def _among_all(self, groups, absent):
        """[batch, query heads] of this device's groups of heads, the inverse of `_heads_of`."""
        own = jnp.concatenate(groups, 1)
        batch, heads = own.shape
        is_own = jnp.arange(self.axis.size)[:, None] == self.axis.rank
        x = jnp.where(is_own, own[:, None], absent)
        return x.reshape(batch, self.axis.size * heads)

    def _exchanged(self, bundle):
        rows = bundle.rows()
        return [
            (rows[name], x) for name, x in bundle.present().items() if _is_exchanged(rows[name])
        ]

    def _sum_repeats(self, x):
        """The gradient of `repeats` copies of each head, of that head."""
        if self.repeats == 1:
            return x
        copies = x.reshape(*x.shape[:2], -1, self.repeats, x.shape[3])
        return copies.sum(3, dtype=jnp.float32).astype(x.dtype)


def _is_exchanged(row: Row) -> bool:
    """Whether an array has both rows and heads; else it is whole on every device, with rows or with
    query heads if it has any."""
    heads, sequence = row.axis("hk"), row.axis("st")
    if sequence is None and "k" in row.dims:
        raise NotImplementedError(f"'ulysses' cannot divide the heads of dimensions {row.dims}")
    return heads is not None and sequence is not None
