"""Rotary position embeddings: the tables of a call, and their meaning."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rotary:
    """Tables of rotary position embeddings, for `cached_attention` and `append_to_cache`.

    The first `width` elements of a head at position p are rotated in pairs: (x, y) becomes
    (x cos - y sin, y cos + x sin) with row p of the tables. A position past the tables uses their
    last row. The rotation is computed in float32 and rounded once.

    Args:
      cos, sin: floating (positions, width / 2); width is a multiple of 16, at most head_dim.
      interleaved: True: pairs are elements 2 i and 2 i + 1; False: elements i and width / 2 + i.
    """

    cos: ArrayLike
    sin: ArrayLike
    interleaved: bool = dataclasses.field(default=False, metadata=dict(static=True))


def rotate(
    x: jax.Array, cos: jax.Array, sin: jax.Array, positions: jax.Array, is_interleaved: bool
) -> jax.Array:
    """x [*positions.shape, heads, head_dim] at its positions."""
    row = jnp.clip(positions, 0, cos.shape[0] - 1)
    cos, sin = (table[row][..., None, :] for table in (cos, sin))
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width].astype(jnp.float32), x[..., width:]
    if is_interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, -1)
    pair = first * cos - second * sin, second * cos + first * sin
    if is_interleaved:
        turned = jnp.stack(pair, -1).reshape(turned.shape)
    else:
        turned = jnp.concatenate(pair, -1)
    return jnp.concatenate([turned.astype(x.dtype), rest], -1)
