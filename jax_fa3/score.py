"""What a score is: the scaled product of a query row and a key, and a bias.

Used by XLA's implementation; the kernels compute the same in src/attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """The caller's scale in float32's precision, or the default, 1 / sqrt(head_dim)."""
    return float(np.float32(1 / math.sqrt(head_dim) if scale is None else scale))


def carry_sign(query: jax.Array, scale: float) -> jax.Array:
    """`query`, to be multiplied by |scale| or, if that is 0, by any number: the scale of the
    kernels is positive."""
    return query if scale > 0 else query * np.sign(scale).astype(query.dtype)


def scores(
    products: jax.Array, scales: Iterable[float | jax.Array], bias: jax.Array | None
) -> jax.Array:
    """The float32 scores of products query @ key^T: times every scale, and with the bias added."""
    for scale in scales:
        products = scale * products
    return products if bias is None else products + bias.astype(jnp.float32)
