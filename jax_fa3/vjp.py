"""Attention with its gradient: one custom_vjp, whatever runs underneath.

Residuals are query, key, value, out and lse. `out` and `lse` carry the checkpoint name "context",
so that a remat policy which saves that name keeps the forward kernel out of the backward pass.
"""

from __future__ import annotations

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from jax_fa3 import sharding
from jax_fa3.calls import Operations
from jax_fa3.context.layout import vary_together
from jax_fa3.options import AttentionOptions, Dense, Index

CHECKPOINT_NAME = "context"


def attend(
    options: AttentionOptions,
    return_lse: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: Index,
    dense: Dense,
    operations: Operations = sharding,
) -> tuple[jax.Array, ...]:
    """(out,) or (out, lse): out [batch, seqlen_q, num_heads_q, head_dim_v], lse [batch,
    num_heads_q, seqlen_q] float32. Only with `return_lse` does the backward pass take dlse.
    `operations` are those of sharding.py, or others for operands that are divided otherwise.
    """
    # Outside of the custom_vjp, so that JAX sums the gradients of what a shard_map replicates.
    operands = vary_together((query, key, value, index, dense))
    return _attention(operations, options, return_lse, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(operations, options, return_lse, query, key, value, index, dense):
    out, lse = operations.forward(options, query, key, value, index, dense)
    return (out, lse) if return_lse else (out,)


def _forward(operations, options, return_lse, query, key, value, index, dense):
    out, lse = (
        checkpoint_name(x, CHECKPOINT_NAME)
        for x in operations.forward(options, query, key, value, index, dense)
    )
    residuals = (query, key, value, out, lse, index, dense)
    return ((out, lse) if return_lse else (out,)), residuals


def _backward(operations, options, return_lse, residuals, cotangents):
    query, key, value, out, lse, index, dense = residuals
    dout, dlse = cotangents if return_lse else (*cotangents, None)
    dquery, dkey, dvalue, dbias = operations.backward(
        options, query, key, value, out, lse, dout, dlse, index, dense
    )
    return dquery, dkey, dvalue, None, Dense(bias=dbias)


_attention.defvjp(_forward, _backward)
