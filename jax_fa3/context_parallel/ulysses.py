"""Strategy "ulysses": sequence parts are exchanged for heads (arXiv:2309.14509).

    forward     all_to_all Q, K, V, O, LSE
    backward    all_to_all Q, K, V, O, LSE, dO, dQ, dK, dV

Each device attends to the whole sequence with its share of the query heads. Key/value heads that
several devices need are repeated before the exchange, and their gradients summed after it, in
float32.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax import lax

from jax_fa3.context_parallel.layout import (
    Part,
    vary_together,
    zigzag_permute,
    zigzag_unpermute,
)
from jax_fa3.operands import Bundle, Operands, Outputs
from jax_fa3.options import AttentionOptions


def forward(part: Part, options: AttentionOptions, operands: Operands) -> Outputs:
    exchange = _Exchange(part, operands)
    outputs = part.local.forward(options, exchange.to_heads(operands))
    return exchange.to_sequence(outputs, absent=-jnp.inf)


def backward(
    part: Part,
    options: AttentionOptions,
    operands: Operands,
    outputs: Outputs,
    cotangents: Outputs,
) -> Operands:
    exchange = _Exchange(part, operands)
    bundles = (exchange.to_heads(x) for x in (operands, outputs, cotangents))
    return exchange.to_sequence(part.local.backward(options, *bundles), absent=0)


class _Exchange:
    """Arrays of part of the sequence with all heads, to the whole with some heads, and back."""

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

    def to_heads(self, bundle: Bundle) -> Bundle:
        """Whole sequences of the heads that belong to this device's query heads."""
        return bundle.map(self._to_heads)

    def to_sequence(self, bundle: Bundle, absent: float) -> Bundle:
        """This device's part of the sequence of results, with all heads; of what has no sequence,
        `absent` for the heads of other devices."""
        return bundle.map(functools.partial(self._to_sequence, absent))

    def _to_heads(self, row, x):
        heads, sequence = row.axis("hk"), row.axis("st")
        if heads is None and sequence is None:
            return x
        if heads is None:
            x = lax.all_gather(x, self.axis.name, axis=sequence, tiled=True)
        else:
            if row.dims[heads] == "k":
                x = jnp.repeat(x, self.repeats, axis=heads)
            if sequence is None:
                count = x.shape[heads] // self.axis.size
                return lax.dynamic_slice_in_dim(x, self.axis.rank * count, count, heads)
            x = lax.all_to_all(x, self.axis.name, heads, sequence, tiled=True)
        return zigzag_unpermute(x, sequence, self.axis.size) if self.layout == "zigzag" else x

    def _to_sequence(self, absent, row, x):
        heads, sequence = row.axis("hk"), row.axis("st")
        if sequence is None:
            count = x.shape[heads]
            shape = [n * (self.axis.size if i == heads else 1) for i, n in enumerate(x.shape)]
            all_heads, x = vary_together((jnp.full(shape, absent, x.dtype), x))
            start = self.axis.rank * count
            return lax.dynamic_update_slice_in_dim(all_heads, x, start, heads)
        if self.layout == "zigzag":
            x = zigzag_permute(x, sequence, self.axis.size)
        x = lax.all_to_all(x, self.axis.name, sequence, heads, tiled=True)
        return self._sum_repeats(x) if row.dims[heads] == "k" else x

    def _sum_repeats(self, x):
        """The gradient of `repeats` copies of each head, of that head."""
        if self.repeats == 1:
            return x
        copies = x.reshape(*x.shape[:2], -1, self.repeats, x.shape[3])
        return copies.sum(3, dtype=jnp.float32).astype(x.dtype)
