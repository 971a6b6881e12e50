"""What a score is: the scaled product of a query row and a key, a bias or a slope of the distance
between them, and a cap. And what a sink is, a score without a key.

Used by XLA's implementation; the kernels compute the same in src/attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa3.operands import Operands
from jax_fa3.options import AttentionOptions


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """The caller's scale in float32's precision, or the default, 1 / sqrt(head_dim)."""
    return float(np.float32(1 / math.sqrt(head_dim) if scale is None else scale))


def carry_sign(query: jax.Array, scale: float) -> jax.Array:
    """`query`, to be multiplied by |scale| or, if that is 0, by any number: the scale of the
    kernels is positive."""
    return query if scale > 0 else query * np.sign(scale).astype(query.dtype)


def scores(
    options: AttentionOptions,
    products: jax.Array,
    scales: Iterable[float | jax.Array],
    terms: Iterable[jax.Array | None],
) -> jax.Array:
    """The float32 scores of products query @ key^T: times every scale, with every term added that
    is there, and then capped."""
    for scale in scales:
        products = scale * products
    for term in terms:
        if term is not None:
            products = products + term.astype(jnp.float32)
    if options.softcap:
        return options.softcap * jnp.tanh(products / options.softcap)
    return products


def changed(
    options: AttentionOptions,
    operands: Operands,
    scores: jax.Array,
    row: jax.Array,
    column: jax.Array,
) -> jax.Array:
    """The scores [b, h, q, g, k] as the call's score function changes them, if it has one.

    row: int32 [q], column: int32 [k]: the numbers of rows and keys.
    """
    functions = options.functions
    if functions is None or functions.score is None:
        return scores
    _, heads, _, group, _ = scores.shape
    return functions.changed_scores(
        scores,
        operands.batch_number,
        operands.head_number.reshape(heads, group),
        row,
        column,
        tuple(operands.captured.values()),
    )


def before_cap(options: AttentionOptions, dscores: jax.Array, scores: jax.Array) -> jax.Array:
    """The gradients of scores before they were capped, of those of capped scores, which are -inf
    where they are hidden."""
    if not options.softcap:
        return dscores
    tanh = jnp.maximum(scores, -options.softcap) / options.softcap
    return dscores * (1 - tanh * tanh)


def alibi(slopes: jax.Array | None, position: jax.Array, column: jax.Array) -> jax.Array | None:
    """float32: what the distance between rows and keys adds to their scores; None without slopes.

    Of dimensions that broadcast, slopes: float32; position: int32, where rows stand among the
    keys; column: int32, the numbers of the keys.
    """
    if slopes is None:
        return None
    distance = jnp.abs(position - column)
    return -slopes * distance.astype(jnp.float32)


def with_sink(
    sinks: jax.Array | None, lse: jax.Array, is_row: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The LSE of scores and a sink, and what the sink leaves of the weights of keys; None where
    there is no sink. Padding has none.

    sinks, is_row: of dimensions that broadcast to those of `lse`; is_row: False in padding, or None
    where there is none.
    """
    if sinks is None:
        return lse, None
    # Where there is neither, the derivatives of logaddexp are NaN.
    is_empty = jnp.maximum(lse, sinks) == -jnp.inf
    joined = jnp.logaddexp(jnp.where(is_empty, 0, lse), sinks)
    joined = jnp.where(is_empty, -jnp.inf, joined)
    if is_row is not None:
        joined = jnp.where(is_row, joined, lse)
    return joined, jnp.exp(lse - jnp.where(joined == -jnp.inf, 0, joined))


def sink_gradient(sinks: jax.Array, lse: jax.Array, delta: jax.Array) -> jax.Array:
    """float32, of the dimensions of `lse`: what each row adds to the gradient of its sink.

    lse: the sink included; -inf in padding, and where the sink is -inf and no key is seen. delta:
    out . dout - dlse.
    """
    has_lse = lse != -jnp.inf
    weight = jnp.exp(jnp.where(has_lse, sinks - lse, -jnp.inf))
    return jnp.where(has_lse, -weight * delta, 0)
