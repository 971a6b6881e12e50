"""Attention with its derivatives: one custom_jvp, whatever runs underneath.

Reverse mode runs the backward operation, forward mode differentiates the code of the forward one,
where that is ordinary code. The residuals are the operands, out and lse; `out` and `lse` carry the
checkpoint name "context", so that a remat policy which saves that name keeps the forward kernel out
of the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from jax_fa3 import sharding
from jax_fa3.flex.operands import CAPTURED, FlexOperands
from jax_fa3.linear_map import linear_map
from jax_fa3.operands import Operands, Outputs
from jax_fa3.operations import FIRST_ORDER_ONLY, Operations, refuse, undifferentiable
from jax_fa3.options import AttentionOptions
from jax_fa3.varying import vary_together

CHECKPOINT_NAME = "context"
NO_FLOAT8_GRADIENT = (
    "float8 inputs have no gradient; pass 16-bit inputs with forward_dtype='float8_e4m3fn'"
)
NO_SLOPE_GRADIENT = "alibi_slopes have no gradient; pass jax.lax.stop_gradient(alibi_slopes)"


def attend(
    options: AttentionOptions, operands: Operands, operations: Operations = sharding
) -> Outputs:
    """The outputs of a call; an LSE, and a cotangent of it, only with `return_residual`. max_logits
    have none.

    `operations` are those of sharding, or others for operands that are divided otherwise.
    """
    # Outside of the custom_jvp, so that JAX sums the gradients of what a shard_map replicates.
    operands = vary_together(operands)
    if operands.alibi_slopes is not None:
        constant = undifferentiable(lambda x: x, NO_SLOPE_GRADIENT)
        operands = operands.replace(alibi_slopes=constant(operands.alibi_slopes))
    if operands.is_float8:
        forward = functools.partial(operations.forward, options)
        outputs = undifferentiable(forward, NO_FLOAT8_GRADIENT)(operands)
        return _asked_for(options, outputs)
    return _attention(operations, options, operands)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attention(operations, options, operands):
    return _asked_for(options, operations.forward(options, operands))


def _derivative(operations, options, primals, tangents):
    (operands,), (tangents,) = primals, tangents
    outputs = operations.forward(options, operands)
    outputs = outputs.map(lambda _, x: checkpoint_name(x, CHECKPOINT_NAME))
    moving = [name for name, x in tangents.present().items() if not isinstance(x, SymbolicZero)]
    dear = tuple(name for name in moving if operands.rows()[name].dear)
    options = dataclasses.replace(options, dear_gradients=dear)
    if any(name.startswith(CAPTURED) for name in dear):
        options = _through_xla(options, operands, dear)
    tangents, results = tangents.only(moving), _asked_for(options, outputs)
    # max_logits are a constant to what differentiates.
    options = dataclasses.replace(options, return_max_logits=False)
    residuals = operands, outputs.replace(max_logits=None)

    def tangents_of_outputs(residuals, tangents):
        if operations is not sharding or not options.is_ordinary_code:
            refuse(FIRST_ORDER_ONLY)

        def forward(moving):
            all_operands = residuals[0].replace(**moving.present())
            return _asked_for(options, operations.forward(options, all_operands))

        return jax.jvp(forward, (residuals[0].only(moving),), (tangents,))[1]

    def gradients(residuals, cotangents):
        if cotangents.out is None:
            cotangents = cotangents.replace(out=jnp.zeros_like(residuals[1].out))
        return operations.backward(options, *residuals, cotangents).only(moving)

    moved = linear_map(
        tangents_of_outputs, gradients, residuals, tangents, results.replace(max_logits=None)
    )
    if results.max_logits is not None:
        moved = moved.replace(max_logits=zero_from_primal(results.max_logits, symbolic_zeros=True))
    return results, moved


_attention.defjvp(_derivative, symbolic_zeros=True)


def _through_xla(
    options: AttentionOptions, operands: FlexOperands, moving: Collection[str]
) -> AttentionOptions:
    """The options with a backward pass that makes gradients of captured arrays, which no kernel
    does."""
    if options.routes.backward == "fa3":
        number, name = next((i, x) for i, x in enumerate(operands.captured) if x in moving)
        array = getattr(operands, name)
        refuse(
            f"the kernels make no gradient of captured array {number}, {array.dtype}"
            f"{list(array.shape)}: pass what it adds to scores as the bias of "
            "dot_product_attention, or jax.lax.stop_gradient of it, or implementation=None, which "
            "runs the backward pass through XLA",
            "flex_attention",
        )
    return dataclasses.replace(options, routes=options.routes._replace(backward="xla"))


def _asked_for(options: AttentionOptions, outputs: Outputs) -> Outputs:
    return outputs if options.return_residual else outputs.replace(lse=None)
