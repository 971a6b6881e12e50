"""Attention with its gradient: one custom_vjp, whatever runs underneath.

Residuals are query, key, value, out and lse. `out` and `lse` carry the checkpoint name "context",
so that a remat policy which saves that name keeps the forward kernel out of the backward pass.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_fa3 import calls, sharding
from jax_fa3.calls import Operations
from jax_fa3.context.layout import vary_together
from jax_fa3.options import AttentionOptions, Dense, Descales, Index

CHECKPOINT_NAME = "context"
NO_FLOAT8_GRADIENT = (
    "float8 inputs have no gradient; pass 16-bit inputs with forward_dtype='float8_e4m3fn'"
)


def attend(
    options: AttentionOptions,
    return_lse: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: Index,
    dense: Dense,
    descales: Descales,
    operations: Operations = sharding,
) -> tuple[jax.Array, ...]:
    """(out,) or (out, lse): out [batch, seqlen_q, num_heads_q, head_dim_v], lse [batch,
    num_heads_q, seqlen_q] float32. Only with `return_lse` does the backward pass take dlse.
    `operations` are those of sharding.py, or others for operands that are divided otherwise.

    float8 arrays have `descales`, an output in bfloat16, no gradient, and go through sharding.py.
    """
    # Outside of the custom_vjp, so that JAX sums the gradients of what a shard_map replicates.
    operands = vary_together((query, key, value, index, dense, descales))
    if descales.query is not None:
        return _float8_attention(options, return_lse, *operands)
    return _attention(operations, options, return_lse, *operands[:-1])


def _float8_attention(options, return_lse, query, key, value, index, dense, descales):
    def forward(*operands):
        return sharding.forward_float8(options, *operands, jnp.dtype(jnp.bfloat16))

    forward = calls.undifferentiable(forward, NO_FLOAT8_GRADIENT)
    out, lse = forward(query, key, value, descales, index, dense)
    return (out, lse) if return_lse else (out,)


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
