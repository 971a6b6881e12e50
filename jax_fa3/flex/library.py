"""Common score and mask functions, with the names of PyTorch's examples.

The functions close over their arrays, which the call then captures, with gradients. They accept and
ignore captured arrays, so a call may combine them with a function that uses captured arrays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jax_fa3.values import as_int, check_soft_cap, one_of, shape_of

Mask = Callable[..., Any]
Score = Callable[..., Any]

ROUGH = lax.Tolerance(rtol=2.0**-11)  # of the hardware's tanh


def noop_mask(batch, head, q_idx, kv_idx, *captured):
    """The mask function with which every row sees every key."""
    return True


def causal_mask(batch, head, q_idx, kv_idx, *captured):
    """The mask function with which row i sees the keys j <= i."""
    return q_idx >= kv_idx


def and_masks(*mask_mods: Mask) -> Mask:
    """A mask function that is True where all `mask_mods` are True; without any, everywhere.

    Raises:
      TypeError: an argument is not a function.
    """
    return _combined(jnp.logical_and, True, mask_mods)


def or_masks(*mask_mods: Mask) -> Mask:
    """A mask function that is True where any of `mask_mods` is True; without any, nowhere.

    Raises:
      TypeError: an argument is not a function.
    """
    return _combined(jnp.logical_or, False, mask_mods)


def _combined(combine, initial: bool, mask_mods: tuple[Mask, ...]) -> Mask:
    for mask_mod in mask_mods:
        if not callable(mask_mod):
            raise TypeError(f"mask_mods contains {mask_mod!r}; expected functions")

    def mask(*x):
        return functools.reduce(combine, (mask_mod(*x) for mask_mod in mask_mods), initial)

    return mask


def generate_sliding_window(window_size: int) -> Mask:
    """A mask function with which row i sees the keys i - window_size <= j <= i."""
    if as_int("window_size", window_size, "an int") < 0:
        raise ValueError(f"window_size is {window_size}; expected at least 0")

    def sliding_window(batch, head, q_idx, kv_idx, *captured):
        return (q_idx >= kv_idx) & (q_idx - kv_idx <= window_size)

    return sliding_window


def generate_prefix_lm_mask(prefix_length: ArrayLike) -> Mask:
    """A mask function with which row i sees the keys j <= i and the prefix j < prefix_length.

    Args:
      prefix_length: an int, or integers (B,), one for each sequence.
    """
    lengths = _array("prefix_length", prefix_length, jnp.integer, (0, 1))

    def prefix_lm(batch, head, q_idx, kv_idx, *captured):
        length = lengths[batch] if lengths.ndim else lengths
        return (kv_idx < length) | (q_idx >= kv_idx)

    return prefix_lm


def generate_doc_mask_mod(document_ids: ArrayLike, mask_mod: Mask = causal_mask) -> Mask:
    """A mask function with which a row sees the keys of its document that `mask_mod` allows.

    Args:
      document_ids: integers (T,) or (B, T), T = S: the document of each row and key, in any order.
      mask_mod: a mask function; its indices count in the sequence, not in the document.
    """
    ids = _array("document_ids", document_ids, jnp.integer, (1, 2))

    def document(batch, head, q_idx, kv_idx, *captured):
        own = ids if ids.ndim == 1 else ids[batch]
        seen = mask_mod(batch, head, q_idx, kv_idx, *captured)
        return (own[q_idx] == own[kv_idx]) & seen

    return document


def generate_alibi_bias(num_heads: int) -> Score:
    """A score function that adds slope * (j - i); the slope of head n is 2^(-8 (n + 1) / N).

    Args:
      num_heads: N, the number of query heads.

    Source: ALiBi, arXiv:2108.12409.
    """
    if as_int("num_heads", num_heads, "an int") < 1:
        raise ValueError(f"num_heads is {num_heads}; expected at least 1")

    def alibi(score, batch, head, q_idx, kv_idx, *captured):
        slope = jnp.exp2(-8 / num_heads * (head + 1).astype(jnp.float32))
        return score + slope * (kv_idx - q_idx).astype(jnp.float32)

    return alibi


def generate_tanh_softcap(soft_cap: float, approx: bool = False) -> Score:
    """A score function that returns soft_cap * tanh(score / soft_cap).

    Args:
      soft_cap: a positive number.
      approx: if True, the kernels use the hardware's tanh, as for `logits_soft_cap`. It is faster
        and has a relative error of at most 2^-11.
    """
    if soft_cap is None:
        raise TypeError("soft_cap is None; expected a positive number")
    check_soft_cap("soft_cap", soft_cap)

    def softcap(score, batch, head, q_idx, kv_idx, *captured):
        tanh = lax.tanh(score / soft_cap, accuracy=ROUGH if approx else None)
        return soft_cap * tanh

    return softcap


def generate_relative_position_bias(table: ArrayLike) -> Score:
    """A score function that adds a learned number for each head and clipped distance.

    Args:
      table: floats (N, 2 R + 1): the numbers for the distances j - i from -R to R. Other distances
        use the nearest end.
    """
    table = _array("table", table, jnp.floating, (2,))
    if table.shape[1] % 2 == 0:
        raise ValueError(
            f"table has shape {shape_of(table)}; expected (heads, 2 R + 1), with an odd number of "
            "distances"
        )
    reach = table.shape[1] // 2

    def relative_position(score, batch, head, q_idx, kv_idx, *captured):
        distance = jnp.clip(kv_idx - q_idx, -reach, reach)
        return score + table[head, distance + reach].astype(jnp.float32)

    return relative_position


def generate_t5_bias(
    table: ArrayLike, *, bidirectional: bool = True, max_distance: int = 128
) -> Score:
    """A score function that adds a learned number for each head and distance bucket, as in T5.

    Args:
      table: floats (buckets, N).
      bidirectional, max_distance: as in `t5_bucket`.
    """
    table = _array("table", table, jnp.floating, (2,))
    reach = as_int("max_distance", max_distance, "an int")
    # Made once for each distance, and not for each pair.
    bucket = t5_bucket(
        jnp.arange(-reach, reach + 1),
        num_buckets=table.shape[0],
        bidirectional=bidirectional,
        max_distance=reach,
    )
    return generate_relative_position_bias(table[bucket].T)


def t5_bucket(
    distance: ArrayLike,
    *,
    num_buckets: int = 32,
    bidirectional: bool = True,
    max_distance: int = 128,
) -> jax.Array:
    """The bucket of each distance j - i from a row to a key.

    Each small distance has its own bucket; larger distances share a bucket, and the range of a
    bucket grows with the distance.

    Args:
      distance: integers of any shape.
      num_buckets: the number of buckets, even, at least 4 if bidirectional and 2 otherwise.
      bidirectional: True: half of the buckets are for keys after the row. False: keys after the row
        share bucket 0 with the row's own key.
      max_distance: all distances of at least max_distance share the last bucket. It must exceed the
        number of small distances: num_buckets / 4 if bidirectional, otherwise num_buckets / 2.

    Returns:
      int32 of the shape of `distance`, from 0 to num_buckets - 1.

    Source: T5, arXiv:1910.10683.
    """
    distance = _array("distance", distance, jnp.integer)
    least = 4 if bidirectional else 2
    if as_int("num_buckets", num_buckets, "an int") < least or num_buckets % 2:
        raise ValueError(
            f"num_buckets is {num_buckets}; expected an even number of at least {least}"
        )
    if as_int("max_distance", max_distance, "an int") <= num_buckets // least:
        raise ValueError(
            f"max_distance is {max_distance}; expected more than {num_buckets // least}, the "
            "number of distances with their own bucket"
        )
    if bidirectional:
        buckets = num_buckets // 2
        first, length = jnp.where(distance > 0, buckets, 0), jnp.abs(distance)
    else:
        buckets = num_buckets
        first, length = 0, jnp.maximum(-distance, 0)
    near = buckets // 2
    # In powers of two, where log2 is exact at the ends of buckets.
    growth = (buckets - near) / math.log2(max_distance / near)
    logarithm = jnp.log2(jnp.maximum(length, near).astype(jnp.float32) / near)
    far = near + (logarithm * growth).astype(jnp.int32)
    return (first + jnp.where(length < near, length, jnp.minimum(far, buckets - 1))).astype(
        jnp.int32
    )


def _array(name: str, x: Any, kind: Any, ndims: tuple[int, ...] = ()) -> jax.Array:
    """`x` as an array of integers or floats, with one of these numbers of dimensions if any."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, kind):
        raise TypeError(f"{name} has dtype {x.dtype}; expected {kind.__name__} numbers")
    if ndims and x.ndim not in ndims:
        raise ValueError(
            f"{name} has {x.ndim} dimensions, shape {shape_of(x)}; expected "
            f"{one_of(tuple(map(str, ndims)))}"
        )
    return x
