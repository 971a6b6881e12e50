"""From 16 bits to float8_e4m3fn for the forward pass: rotation of query and key, scales, rounding.

    float8 = round(rotated / descale),    descale = max |rotated| / 448    over what shares a scale

Query and key are rotated by the same orthogonal matrix, random signs and then a Hadamard transform,
which leaves their products as they are and spreads an outlier over its row; that is "incoherent
processing" (arXiv:2407.08608, section 3.3). Value stays in its own basis, and may be put into the
order in which a tensor core takes it.

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
from jax_fa3.options import BLOCK, FLOAT8, Descales, Index, num_blocks, padded_keys

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
    value: jax.Array  # (B, S, K, H) float8_e4m3fn; prepared (B, K, H, 128 * ceil(S / 128))
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
    prepare_value: bool = False,
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
      prepare_value: give value in the layout that the kernels read, keys innermost (docs/fp8.md),
        for `dot_product_attention(..., value_is_prepared=True)`; they need not transpose it then.
      query_seq_lengths, key_value_seq_lengths: int32 (B,); rows from there on are padding, which
        takes no part in a scale and becomes 0.
      query_descale, key_descale, value_descale: positive float32 scales of the rotated arrays to
        use in place of measured ones, of the shapes that `dot_product_attention` takes.
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
    validate.check_flag("prepare_value", prepare_value)
    validate.check_flag("return_saturated", return_saturated)
    how = (granularity, rotation_seed, bool(prepare_value))
    results = _run(how, *arrays, index, descales)
    return results if return_saturated else results[0]


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _run(how, query, key, value, index, descales):
    """quantize() with or without a batch dimension, compiled once outside of jax.jit."""
    granularity, seed, prepare = how
    given = spread(query, key, value, descales)
    unbatched = query.ndim == 3
    if unbatched:
        query, key, value = query[None], key[None], value[None]
    index = jax.tree.map(lambda x: jnp.broadcast_to(x, query.shape[:1]), index)
    quantized, saturated = quantize(query, key, value, index, granularity, seed, given)
    if prepare:
        quantized = quantized._replace(value=prepare_value(quantized.value))
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


def rounded(
    query: jax.Array, key: jax.Array, value: jax.Array, index: Index
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """16-bit arrays as their forward pass in float8 has them, in their own dtype and basis."""
    x, _ = quantize(query, key, value, index)

    def read(float8, descale, like, seed):
        array = float8.astype(like.dtype)  # which holds it exactly
        array = array.astype(jnp.float32) if seed is None else _rotate(array, seed, back=True)
        return (array * by_row(descale, like.shape[1])[..., None]).astype(like.dtype)

    return (
        read(x.query, x.query_descale, query, SEED),
        read(x.key, x.key_descale, key, SEED),
        read(x.value, x.value_descale[..., None], value, None),
    )


def prepare_value(value: jax.Array) -> jax.Array:
    """value [batch, seqlen_k, num_heads_kv, head_dim_v] as the kernels read it: [batch,
    num_heads_kv, head_dim_v, keys], zeros up to a multiple of BLOCK keys.

    A tensor core finds the weights of a row where the product before left them, so the keys of
    each 16 stand in the order of that product's registers: key 8 a + 2 c + e at 4 c + 2 a + e.
    """
    batch, seqlen, heads, head_dim = value.shape
    filled = padded_keys(seqlen)
    value = _whole(value, 1)
    value = jnp.pad(value, ((0, 0), (0, filled - seqlen), (0, 0), (0, 0)))
    value = value.reshape(batch, filled // 16, 2, 4, 2, heads, head_dim)
    return value.transpose(0, 5, 6, 1, 3, 2, 4).reshape(batch, heads, head_dim, filled)


def restore_value(prepared: jax.Array, seqlen: int) -> jax.Array:
    """The first `seqlen` rows of the value of which `prepare_value` made this."""
    batch, heads, head_dim, filled = prepared.shape
    value = prepared.reshape(batch, heads, head_dim, filled // 16, 4, 2, 2)
    value = value.transpose(0, 3, 5, 4, 6, 1, 2).reshape(batch, filled, heads, head_dim)
    return lax.slice_in_dim(value, 0, seqlen, axis=1)


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


def _rotate(x: jax.Array, seed: int, *, back: bool = False) -> jax.Array:
    """x @ rotation, or x @ rotation^T, which undoes it, in float32.

    The matrix goes in as -1, 0 and 1, which 16 bits hold exactly, so that 16-bit arrays take the
    fast way through a matrix unit and their products are exact.
    """
    head_dim = x.shape[-1]
    product = jnp.einsum(
        "...e,de->...d" if back else "...d,de->...e",
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
    largest = _whole(jnp.moveaxis(largest, 1, 2), 2)  # [batch, heads, seq]
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


def _whole(x: jax.Array, axis: int) -> jax.Array:
    """x with all of the rows along `axis`, where an explicit mesh axis splits them."""
    sharding = jax.typeof(x).sharding
    if sharding.spec[axis] is None:
        return x
    spec = [None if i == axis else names for i, names in enumerate(sharding.spec)]
    return jax.sharding.reshard(x, sharding.update(spec=spec))


def spread(query: jax.Array, key: jax.Array, value: jax.Array, given: Descales) -> Descales:
    """Checked scales of arrays with or without a batch dimension, in the shapes used inside."""
    batch = query.shape[0] if query.ndim == 4 else 1

    def by_head(x, array, *blocks):
        if x is None:
            return None
        blocks = x.shape[-1:] if x.ndim == array.ndim - 1 else blocks
        shape = (batch, array.shape[-2], *blocks)
        return jnp.broadcast_to(x, shape) if x.ndim == 0 else x.reshape(shape)

    return Descales(
        by_head(given.query, query, 1), by_head(given.key, key, 1), by_head(given.value, value)
    )


def by_row(descale: jax.Array, seqlen: int) -> jax.Array:
    """Scales [batch, heads, blocks] as those of the rows, [batch, seqlen | 1, heads]."""
    if descale.shape[-1] > 1:
        descale = jnp.repeat(descale, BLOCK, axis=-1)[..., :seqlen]
    return jnp.moveaxis(descale, 1, 2)
