"""Attention with its gradient: one custom_vjp, whatever runs underneath.

Residuals are the operands, out and lse, and whether a bias' gradient is wanted. `out` and `lse`
carry the checkpoint name "context", so that a remat policy which saves that name keeps the forward
kernel out of the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import (
    SymbolicZero,
    custom_vjp_primal_tree_values,
    zero_from_primal,
)

from jax_fa3 import sharding
from jax_fa3.context_parallel.layout import vary_together
from jax_fa3.operands import Operands, Outputs
from jax_fa3.operations import Operations, undifferentiable
from jax_fa3.options import AttentionOptions

CHECKPOINT_NAME = "context"
NO_FLOAT8_GRADIENT = (
    "float8 inputs have no gradient; pass 16-bit inputs with forward_dtype='float8_e4m3fn'"
)
NO_SLOPE_GRADIENT = "alibi_slopes have no gradient; pass jax.lax.stop_gradient of them"


def attend(
    options: AttentionOptions, operands: Operands, operations: Operations = sharding
) -> Outputs:
    """The outputs of a call; an LSE, and a cotangent of it, only with `return_residual`. max_logits
    have none.

    `operations` are those of sharding, or others for operands that are divided otherwise.
    """
    # Outside of the custom_vjp, so that JAX sums the gradients of what a shard_map replicates.
    operands = vary_together(operands)
    if operands.alibi_slopes is not None:
        constant = undifferentiable(lambda x: x, NO_SLOPE_GRADIENT)
        operands = operands.replace(alibi_slopes=constant(operands.alibi_slopes))
    if operands.is_float8:
        forward = functools.partial(operations.forward, options)
        outputs = undifferentiable(forward, NO_FLOAT8_GRADIENT)(operands)
        return _asked_for(options, outputs)
    return _attention(operations, options, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(operations, options, operands):
    return _asked_for(options, operations.forward(options, operands))


def _forward(operations, options, operands):
    """Of operands that JAX has marked as perturbed or not.

    Whether the bias is perturbed stays until the backward pass as the extent of an array. It must
    not be in the tree of the residuals: where one traced call is differentiated twice, by different
    arguments, JAX (0.10.2) may hand the tree of the one's to the other.
    """
    bias = operands.bias
    wanted = None if bias is None else jnp.zeros(1 if bias.perturbed else 0)
    operands = custom_vjp_primal_tree_values(operands)
    outputs = operations.forward(options, operands)
    outputs = outputs.map(lambda _, x: checkpoint_name(x, CHECKPOINT_NAME))
    return _asked_for(options, outputs), (operands, outputs.replace(max_logits=None), wanted)


def _backward(operations, options, residuals, cotangents):
    operands, outputs, wanted = residuals
    cotangents = cotangents.replace(max_logits=None)
    if wanted is not None:
        options = dataclasses.replace(options, bias_gradient=wanted.size > 0)
    if isinstance(cotangents.lse, SymbolicZero):
        cotangents = cotangents.replace(lse=None)
    if isinstance(cotangents.out, SymbolicZero):
        cotangents = cotangents.replace(out=zero_from_primal(outputs.out))
    return (operations.backward(options, operands, outputs, cotangents),)


def _asked_for(options: AttentionOptions, outputs: Outputs) -> Outputs:
    return outputs if options.return_residual else outputs.replace(lse=None)


_attention.defvjp(_forward, _backward, symbolic_zeros=True)
