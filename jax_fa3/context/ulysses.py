"""Strategy "ulysses": sequence parts are exchanged for heads (arXiv:2309.14509).

    forward     all_to_all Q, K, V, O, LSE
    backward    all_to_all Q, K, V, O, LSE, dO, dQ, dK, dV

Each device attends to the whole sequence with its share of the query heads. Key/value heads that
several devices need are repeated before the exchange, and their gradients summed after it, in
float32.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from jax_fa3.calls import Operations
from jax_fa3.context.layout import Axis, Layout, zigzag_permute, zigzag_unpermute
from jax_fa3.options import AttentionOptions, Dense, Index


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
    exchange = _Exchange(axis, layout, query, key)
    query, key, value = exchange.operands(query, key, value)
    out, lse = local.forward(options, query, key, value, index, Dense())
    return exchange.to_sequence(out), exchange.to_sequence(lse, heads=1)


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
    exchange = _Exchange(axis, layout, query, key)
    out, dout = (exchange.to_heads(x) for x in (out, dout))
    lse, dlse = (None if x is None else exchange.to_heads(x, heads=1) for x in (lse, dlse))
    query, key, value = exchange.operands(query, key, value)
    dquery, dkey, dvalue, _ = local.backward(
        options, query, key, value, out, lse, dout, dlse, index, Dense()
    )
    dkey, dvalue = (exchange.sum_repeats(exchange.to_sequence(x)) for x in (dkey, dvalue))
    return exchange.to_sequence(dquery), dkey, dvalue


class _Exchange:
    """Arrays of part of the sequence with all heads, to the whole with some heads, and back.

    Heads stand in dimension `heads`, 2 or, in an LSE, 1; the sequence in the other of the two.
    """

    def __init__(self, axis: Axis, layout: Layout, query: jax.Array, key: jax.Array):
        self.axis, self.layout = axis, layout
        num_heads_q, num_heads_kv = query.shape[2], key.shape[2]
        if num_heads_q % axis.size:
            raise ValueError(
                f"query has {num_heads_q} heads; expected a multiple of the {axis.size} devices of "
                f"mesh axis {axis.name!r}, over which strategy 'ulysses' divides them (the "
                "strategies 'ring' and 'allgather' take any number)"
            )
        group = num_heads_q // num_heads_kv
        # The largest groups that divide both a device's query heads and those of a key/value head.
        self.repeats = group // math.gcd(group, num_heads_q // axis.size)

    def operands(self, query, key, value):
        """The three with whole sequences, and the key/value heads that belong to the query's."""
        key, value = (jnp.repeat(x, self.repeats, axis=2) for x in (key, value))
        return [self.to_heads(x) for x in (query, key, value)]

    def to_heads(self, x, heads=2):
        x = lax.all_to_all(x, self.axis.name, heads, 3 - heads, tiled=True)
        return zigzag_unpermute(x, 3 - heads, self.axis.size) if self.layout == "zigzag" else x

    def to_sequence(self, x, heads=2):
        if self.layout == "zigzag":
            x = zigzag_permute(x, 3 - heads, self.axis.size)
        return lax.all_to_all(x, self.axis.name, 3 - heads, heads, tiled=True)

    def sum_repeats(self, x):
        """The gradient of `repeats` copies of each head, of that head."""
        if self.repeats == 1:
            return x
        copies = x.reshape(*x.shape[:2], -1, self.repeats, x.shape[3])
        return copies.sum(3, dtype=jnp.float32).astype(x.dtype)
