"""The types of a custom call's results."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def result_type(like: jax.Array, shape: tuple[int, ...], dtype) -> jax.core.ShapedArray:
    """A result's type, by default of `like`'s dtype, varying over the same manual mesh axes."""
    like = jax.typeof(like)
    sharding = like.sharding.update(spec=(None,) * len(shape))
    dtype = like.dtype if dtype is None else jnp.dtype(dtype)
    return like.update(shape=shape, dtype=dtype, sharding=sharding)
