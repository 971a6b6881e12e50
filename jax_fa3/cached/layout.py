"""The orders in which the dimensions of a cache may stand, and its tokens by page and slot.

A layout is the order of the letters p page, s slot of a page, k key/value head, h head_dim.
"fused" is one array [p, s, 2 k, h] with heads k0 v0 k1 v1 ... A contiguous cache is a paged one
that has one page for each sequence.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

FUSED = "fused"
LAYOUTS = ("pskh", "kpsh", "pksh", "skph", FUSED)


def order(layout: str) -> str:
    """The letters of an array's dimensions."""
    return "pskh" if layout == FUSED else layout


def extent(cache: jax.Array, layout: str, letter: str) -> int:
    return cache.shape[order(layout).index(letter)]


def take(cache: jax.Array, layout: str, page: jax.Array, slot: jax.Array) -> jax.Array:
    """The tokens at (page, slot), which must be inside: [*page.shape, heads, head_dim]."""
    found = cache.at[_index(layout, page, slot)].get(mode="promise_in_bounds")
    return jnp.moveaxis(found, 0, -2) if _leads_with_heads(layout) else found


def put(
    cache: jax.Array, layout: str, page: jax.Array, slot: jax.Array, tokens: jax.Array
) -> jax.Array:
    """The cache with tokens [*page.shape, heads, head_dim] at (page, slot); those of a page that
    the cache does not have are dropped. Numbers are at least 0."""
    tokens = jnp.moveaxis(tokens, -2, 0) if _leads_with_heads(layout) else tokens
    return cache.at[_index(layout, page, slot)].set(tokens, mode="drop")


def split_heads(cache: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Fused heads [..., 2 k, h] as those of keys and of values."""
    pairs = cache.reshape(*cache.shape[:-2], -1, 2, cache.shape[-1])
    return pairs[..., 0, :], pairs[..., 1, :]


def join_heads(key: jax.Array, value: jax.Array) -> jax.Array:
    """The inverse of split_heads."""
    pairs = jnp.stack([key, value], -2)
    return pairs.reshape(*key.shape[:-2], -1, key.shape[-1])


def _index(layout: str, page: jax.Array, slot: jax.Array) -> tuple:
    places = {"p": page, "s": slot}
    return tuple(places.get(letter, slice(None)) for letter in order(layout))


def _leads_with_heads(layout: str) -> bool:
    """Whether indexing leaves the heads in front of what it indexes: NumPy does where the indices
    stand side by side behind them."""
    return order(layout)[0] == "k"
