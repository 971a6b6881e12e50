"""From 16 bits to float8_e4m3fn for the forward pass: rotation of query and key, scales, rounding.

    float8 = round(rotated / descale),    descale = max |rotated| / 448    over what shares a scale

Query and key are rotated by the same orthogonal matrix, random signs and then a Hadamard transform,
which leaves their products as they are and spreads an outlier over its row; that is "incoherent
processing" (arXiv:2407.08608, section 3.3). Value stays in its own basis.

Inside the package scales have the shapes of `options.Descales`.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_fa3 import validate
from jax_fa3.options import BLOCK, FLOAT8, Descales, Index, num_blocks

Granularity = Literal["tensor", "head", "block"]

LARGEST = 448.0  # of e4m3
OVERFLOW = 464.0  # from here on rounding to nearest would pass it
SEED = 0  # of the rotation, where the caller has no part in it


class QuantizedQKV(NamedTuple):
    """float8 arrays and the float32 scales by which they are to be multiplied.

    Letters as in `dot_product_attention`; 3-D arrays have no B. nq is ceil(T / 128) and nk is
    ceil(S / 128) where blocks of 128 rows have scales of their own, else 1.
    """

    query: jax.Array  # (B, T, N, H) float8_e4m3fn
    key: jax.Array  # (B, S, K, H) float8_e4m3fn
    value: jax.Array  # (B, S, K, H) float8_e4m3fn
    query_descale: jax.Array  # (B, N, nq)
    key_descale: jax.Array  # (B, K, nk)
    value_descale: jax.Array  # (B, K)


class Saturated(NamedTuple):
    """Numbers of elements cut to the largest float8, int32 ()."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


def quantize_qkv(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    granularity: Granularity = "block",
    rotation_seed: int | None = SEED,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    query_descale: ArrayLike | None = None,
    key_descale: ArrayLike | None = None,
    value_descale: ArrayLike | None = None,
    return_saturated: bool = False,
) -> Any:
    """float8 query, key and value with scales, as `dot_product_attention` takes them.

    Args:
      query, key, value: as in `dot_product_attention`; bfloat16, float16 or float32.
      granularity: what shares a scale: "tensor", all of it; "head", a (batch, head); "block", 128
        rows of a (batch, head) in query and key, and a (batch, head) in value.
      rotation_seed: of the random signs with which query and key are rotated: the same seed and
        head_dim give the same rotation, always. None leaves them as they are. Keys and queries
        that meet must have the same seed.
      query_seq_lengths, key_value_seq_lengths: int32 (B,); rows from there on are padding, which
        takes no part in a scale and becomes 0.
      query_descale, key_descale, value_descale: float32 scales of the rotated arrays to use in
        place of measured ones, of the shapes that `dot_product_attention` takes.
      return_saturated: also return how many elements were cut to the largest float8, 448 scales.
        With measured scales there are none.

    Returns:
      `QuantizedQKV`; with return_saturated a pair of it and `Saturated`.

    Raises:
      ValueError, TypeError: an argument does not fit; the message names it, got and expected.

    Numerics:
      Rotation and scaling are in float32. NaN and infinity become NaN (e4m3 has no infinity) and
      take no part in a scale. The rotation's Hadamard blocks are as large as the largest power of
      two that divides head_dim: 128 for 128, 64 for 64 and 192, 32 for 96.

    Derivative:
      Straight-through: rounding passes a gradient on, what saturates has none, scales are
      constants. JAX gives float8 arrays float8 cotangents, which suits no training step: that is
      what `dot_product_attention(..., forward_dtype="float8_e4m3fn")` is for.

    Example:
      >>> q8 = jax_fa3.quantize_qkv(q, k, v)
      >>> out = jax_fa3.dot_product_attention(**q8._asdict())

    Source: FlashAttention-3, arXiv:2407.08608; Hadamard rotations, arXiv:2404.00456.
    """
    arrays = {"query": query, "key": key, "value": value}
    arrays = [validate.as_array(*item) for item in arrays.items()]
    descales = Descales(
        validate.as_array("query_descale", query_descale),
        validate.as_array("key_descale", key_descale),
        validate.as_array("value_descale", value_descale),
    )
    index = Index(
        validate.as_array("query_seq_lengths", query_seq_lengths),
        validate.as_array("key_value_seq_lengths", key_value_seq_lengths),
    )
    validate.check_heads(*arrays)
    validate.check_descales(*arrays, descales)
    validate.check_lengths(arrays[0], index)
    validate.check_choice("granularity", granularity, get_args(Granularity))
    validate.check_seed("rotation_seed", rotation_seed)
    validate.check_flag("return_saturated", return_saturated)
    results = _run(granularity, rotation_seed, *arrays, index, descales)
    return results if return_saturated else results[0]


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _run(granularity, seed, query, key, value, index, descales):
    """quantize() with or without a batch dimension, compiled once outside of jax.jit."""
    given = spread(query, key, value, descales)
    unbatched = query.ndim == 3
    if unbatched:
        query, key, value = query[None], key[None], value[None]
    index = jax.tree.map(lambda x: jnp.broadcast_to(x, query.shape[:1]), index)
    quantized, saturated = quantize(query, key, value, index, granularity, seed, given)
    return jax.tree.map(lambda x: x[0], quantized) if unbatched else quantized, saturated


def quantize(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: Index,
    granularity: Granularity = "block",
    seed: int | None = SEED,
    given: Descales | None = None,
) -> tuple[QuantizedQKV, Saturated]:
    """What `quantize_qkv` does, of checked 4-D arrays; scales that are not given are measured."""
    query_given, key_given, value_given = given or Descales()
    if value_given is not None:
        value_given = value_given[..., None]
    whole = "head" if granularity == "block" else granularity
    tensors, descales, saturated = zip(
        _quantize(query, index.query_lengths, granularity, seed, query_given),
        _quantize(key, index.key_lengths, granularity, seed, key_given),
        _quantize(value, index.key_lengths, whole, None, value_given),
        strict=True,
    )
    return QuantizedQKV(*tensors, *descales[:2], descales[2][..., 0]), Saturated(*saturated)


def _quantize(x, lengths, granularity, seed, descale):
    """x [batch, seq, heads, dim] in float8, its scales [batch, heads, blocks], and the number of
    elements that saturate.
    """
    seqlen = x.shape[1]
    if lengths is not None:
        inside = jnp.arange(seqlen) < lengths[:, None]
        x = jnp.where(inside[..., None, None], x, 0)
    x = x.astype(jnp.float32) if seed is None else _rotate(x, seed)
    descale = lax.stop_gradient(_measure(x, granularity) if descale is None else descale)
    x = x / by_row(descale, seqlen)[..., None]
    saturates = jnp.isfinite(x) & (jnp.abs(x) >= OVERFLOW)
    x = jnp.where(saturates, jnp.sign(x) * LARGEST, x)
    return x.astype(FLOAT8), descale, saturates.sum(dtype=jnp.int32)


def _rotate(x: jax.Array, seed: int) -> jax.Array:
    """x @ rotation, in float32.

    The matrix goes in as -1, 0 and 1, which 16 bits hold exactly, so that 16-bit arrays take the
    fast way through a matrix unit and their products are exact.
    """
    head_dim = x.shape[-1]
    product = jnp.einsum(
        "...d,de->...e",
        x,
        _rotation(head_dim, seed).astype(x.dtype),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return product * _hadamard_order(head_dim) ** -0.5


def _rotation(head_dim: int, seed: int) -> jax.Array:
    """int32 [head_dim, head_dim], a multiple of an orthogonal matrix: random signs of the rows, in
    which blocks of Hadamard's matrix, (-1)^popcount(i & j), stand on the diagonal.

    Of bit operations alone: custom_partitioning takes no constant arrays.
    """
    index = lax.iota(jnp.uint32, head_dim)
    row, column = index[:, None], index[None, :]
    order = _hadamard_order(head_dim)
    odd = (
        lax.population_count(row & column & (order - 1)) + _random_bits(index, seed)[:, None]
    ) & 1
    return jnp.where(row // order == column // order, 1 - 2 * odd.astype(jnp.int32), 0)


def _hadamard_order(head_dim: int) -> int:
    """The largest power of two that divides head_dim."""
    return head_dim & -head_dim


def _random_bits(index: jax.Array, seed: int) -> jax.Array:
    """A bit for each index, the same on every machine: MurmurHash3's last step, of both numbers."""
    x = index * np.uint32(0x9E3779B9) + np.uint32(seed)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return (x ^ (x >> 16)) & 1


def _measure(x: jax.Array, granularity: Granularity) -> jax.Array:
    """Scales [batch, heads, blocks] that bring the largest element of each group to 448."""
    batch, seqlen, heads, _ = x.shape
    largest = jnp.where(jnp.isfinite(x), jnp.abs(x), 0).max(-1, initial=0)
    largest = _gather_rows(jnp.moveaxis(largest, 1, 2))  # [batch, heads, seq]
    if granularity == "tensor":
        largest = jnp.broadcast_to(largest.max(initial=0), (batch, heads, 1))
    elif granularity == "head":
        largest = largest.max(-1, initial=0, keepdims=True)
    else:
        blocks = num_blocks(seqlen)
        missing = blocks * BLOCK - seqlen
        largest = jnp.pad(largest, ((0, 0), (0, 0), (0, missing)))
        largest = largest.reshape(batch, heads, blocks, BLOCK).max(-1)
    return jnp.maximum(largest / LARGEST, jnp.finfo(jnp.float32).tiny)  # never 0: it divides


def _gather_rows(x: jax.Array) -> jax.Array:
    """x whole along its last dimension, where an explicit mesh axis splits it."""
    sharding = jax.typeof(x).sharding
    if sharding.spec[-1] is None:
        return x
    return jax.sharding.reshard(x, sharding.update(spec=(*sharding.spec[:-1], None)))


def spread(query: jax.Array, key: jax.Array, value: jax.Array, given: Descales) -> Descales:
    """Checked scales of arrays with or without a batch dimension, in the shapes used inside."""
    batch = query.shape[0] if query.ndim == 4 else 1

    def by_block(x, array):
        if x is None:
            return None
        heads = array.shape[-2]
        blocks = x.shape[-1] if x.ndim == array.ndim - 1 else 1
        if x.ndim == 0:
            return jnp.broadcast_to(x, (batch, heads, 1))
        return x.reshape(batch, heads, blocks)

    value_descale = by_block(given.value, value)
    if value_descale is not None:
        value_descale = value_descale[..., 0]
    return Descales(by_block(given.query, query), by_block(given.key, key), value_descale)


def by_row(descale: jax.Array, seqlen: int) -> jax.Array:
    """Scales [batch, heads, blocks] as those of the rows, [batch, seqlen | 1, heads]."""
    if descale.shape[-1] > 1:
        descale = jnp.repeat(descale, BLOCK, axis=-1)[..., :seqlen]
    return jnp.moveaxis(descale, 1, 2)
