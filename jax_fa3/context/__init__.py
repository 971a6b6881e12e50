"""Attention over a sequence that is divided over a mesh axis, at the level of calls.py.

Every function here runs once on each device of the axis, with the axis name bound (inside
jax.shard_map, or where a partitioned operation is lowered), on 4-D local arrays of equal shape on
all devices. `options` and `index` speak of the whole sequence: lengths and offsets are global.
Pieces of the work are calls of `local`, which is calls.py, or what partitions these further.

Three strategies, each a forward and a backward function:

    allgather   every device gathers all keys and values, and attends with its own queries
    ring        keys and values travel from device to device, one part at a time
    ulysses     sequence parts are exchanged for heads, and each device attends to whole sequences

A layout says which rows a device holds: "contiguous" (device r the r-th part) or "zigzag" (of 2N
chunks the r-th and the r-th from the end, so that causal work is equal; see layout.py).
"""

from __future__ import annotations

from typing import Any, Literal

import jax
from jax import lax

from jax_fa3 import calls
from jax_fa3.calls import Operations
from jax_fa3.context import allgather, ring, ulysses
from jax_fa3.context.layout import Axis, Layout
from jax_fa3.options import AttentionOptions, Index

Strategy = Literal["allgather", "ring", "ulysses"]

GATHER_LIMIT = 4 << 30  # bytes of gathered keys and values: 1M tokens, 8 heads of 128, in bf16

_STRATEGIES = {"allgather": allgather, "ring": ring, "ulysses": ulysses}


def forward(
    strategy: Strategy,
    axis_name: str | tuple[str, ...],
    options: AttentionOptions,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: Index,
    *,
    layout: Layout = "contiguous",
    local: Operations = calls,
) -> tuple[jax.Array, jax.Array]:
    """out [batch, seqlen_q, num_heads_q, head_dim_v] and lse [batch, num_heads_q, seqlen_q] of
    this device's query rows, which see the keys of all devices.
    """
    axis = Axis.bound(axis_name)
    return _STRATEGIES[strategy].forward(local, axis, layout, options, query, key, value, index)


def backward(
    strategy: Strategy,
    axis_name: str | tuple[str, ...],
    options: AttentionOptions,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
    index: Index,
    *,
    layout: Layout = "contiguous",
    local: Operations = calls,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of this device's query, key and value; out and lse are those of `forward`."""
    # Else XLA takes these exchanges for those of `forward` and keeps their results until here.
    key, value = lax.optimization_barrier((key, value))
    axis = Axis.bound(axis_name)
    return _STRATEGIES[strategy].backward(
        local, axis, layout, options, query, key, value, out, lse, dout, dlse, index
    )


def choose(options: AttentionOptions, query: Any, key: Any, value: Any, axis_size: int) -> Strategy:
    """The strategy for these local arrays, or their types, over `axis_size` devices.

    A ring moves as many bytes as gathering does, but next to its kernels, and it holds one part of
    the keys at a time; it merges a partial result at each step. It is right where a window lets it
    pass over most steps, where the gathered keys are as many as all queries (without groups of
    query heads), and where they take too much memory. Else gathering is: two calls at full size,
    with the sums of a single device. Ulysses depends on the number of heads and moves queries and
    outputs too; it is never picked.
    """
    seqlen_k, num_heads_kv = key.shape[1:3]
    row_bytes = num_heads_kv * (key.shape[3] + value.shape[3]) * key.dtype.itemsize
    gathered = key.shape[0] * seqlen_k * axis_size * row_bytes
    reach = options.window_left + options.window_right
    few_steps = reach <= (axis_size // 2 - 1) * seqlen_k
    if few_steps or query.shape[2] == num_heads_kv or gathered > GATHER_LIMIT:
        return "ring"
    return "allgather"
