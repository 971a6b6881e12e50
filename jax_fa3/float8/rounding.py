"""From 16 bits to float8_e4m3fn for the forward pass: rotation of query and key, scales, rounding.

    float8 = round(rotated / descale),    descale = max |rotated| / 448    over what shares a scale

Query and key are rotated by the same orthogonal matrix, random signs and then a Hadamard transform,
which leaves their products as they are and spreads an outlier over its row; that is "incoherent
processing" (arXiv:2407.08608, section 3.3). Value stays in its own basis, and may be put into the
order in which a tensor core takes it.

Inside the package scales have the dimensions of `Operands`' rows.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fa3 import mask
from jax_fa3.operands import Operands
from jax_fa3.options import BLOCK, FLOAT8, num_blocks, padded_keys

Granularity = Literal["tensor", "head", "block"]

LARGEST = 448.0  # of e4m3
OVERFLOW = 464.0  # from here on rounding to nearest would pass it
SEED = 0  # of the rotation, where the caller has no part in it
DESCALES = ("query_descale", "key_descale", "value_descale")
ARRAYS = ("query", "key", "value")
TAKEN = (*ARRAYS, "query_lengths", "key_lengths")  # what the kernels' rounding depends on
GIVEN = (*ARRAYS, "prepared_value", *DESCALES)  # what it gives


class QuantizedQKV(NamedTuple):
    """float8 arrays and their float32 descales: an element means float8 value times descale.

    Letters as in `dot_product_attention`; 3-D arrays have no B. nq is ceil(T / 128) and nk is
    ceil(S / 128) if each block of 128 rows has its own scale, otherwise 1.
    """

    query: jax.Array  # (B, T, N, H) float8_e4m3fn
    key: jax.Array  # (B, S, K, H) float8_e4m3fn
    value: jax.Array  # (B, S, K, H) float8_e4m3fn; prepared (B, K, H, 128 * ceil(S / 128))
    query_descale: jax.Array  # (B, N, nq)
    key_descale: jax.Array  # (B, K, nk)
    value_descale: jax.Array  # (B, K)


class Saturated(NamedTuple):
    """The numbers of elements that were cut to the largest float8 number, int32 ()."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


def quantize(
    operands: Operands, granularity: Granularity = "block", seed: int | None = SEED
) -> tuple[Operands, Saturated]:
    """Query, key and value in float8, and their scales.

    Scales that the operands have are used; others are measured.
    """
    value_given = operands.value_descale
    if value_given is not None:
        value_given = value_given[..., None]
    whole = "head" if granularity == "block" else granularity
    query_lengths, key_lengths = operands.query_lengths, operands.key_lengths
    tensors, descales, saturated = zip(
        _quantize(operands.query, query_lengths, granularity, seed, operands.query_descale),
        _quantize(operands.key, key_lengths, granularity, seed, operands.key_descale),
        _quantize(operands.value, key_lengths, whole, None, value_given),
        strict=True,
    )
    scales = (*descales[:2], descales[2][..., 0])
    quantized = zip((*ARRAYS, *DESCALES), (*tensors, *scales), strict=True)
    return Operands(**dict(quantized)), Saturated(*saturated)


def settled(quantized: Operands) -> Operands:
    """Arrays that are float8 indeed: XLA, which may compute more exactly than asked, would leave
    out a way to float8 and back."""
    return lax.optimization_barrier(quantized)


def rounded(operands: Operands) -> Operands:
    """16-bit query, key and value as their forward pass in float8 has them, in their own dtype and
    basis."""
    x = settled(quantize(operands)[0])

    def read(float8, descale, like, seed):
        array = float8.astype(like.dtype)  # which holds it exactly
        array = array.astype(jnp.float32) if seed is None else _rotate(array, seed, back=True)
        return (array * by_row(descale, like.shape[1])[..., None]).astype(like.dtype)

    return Operands(
        query=read(x.query, x.query_descale, operands.query, SEED),
        key=read(x.key, x.key_descale, operands.key, SEED),
        value=read(x.value, x.value_descale[..., None], operands.value, None),
    )


def prepared(quantized: Operands) -> Operands:
    """The quantized arrays with their value prepared."""
    return quantized.replace(value=None, prepared_value=prepare_value(quantized.value))


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


def straight_through(
    tangents: Operands, operands: Operands, scales: Operands, seed: int | None = SEED
) -> Operands:
    """The tangents of float8 arrays, from those of the operands that were rounded with measured
    scales, so that nothing saturates: rounding passes them on.
    """

    def scaled(x, lengths, descale, seed):
        return _scale(_rotated(x, lengths, seed), descale).astype(FLOAT8)

    query_lengths, key_lengths = operands.query_lengths, operands.key_lengths
    value_descale = scales.value_descale[..., None]
    return Operands(
        query=scaled(tangents.query, query_lengths, scales.query_descale, seed),
        key=scaled(tangents.key, key_lengths, scales.key_descale, seed),
        value=scaled(tangents.value, key_lengths, value_descale, None),
    )


def _quantize(x, lengths, granularity, seed, descale):
    """x [batch, seq, heads, dim] in float8, its scales [batch, heads, blocks], and the number of
    elements that saturate.
    """
    x = _rotated(x, lengths, seed)
    descale = lax.stop_gradient(_measure(x, granularity) if descale is None else descale)
    x = _scale(x, descale)
    is_finite = jnp.isfinite(x)
    saturates = is_finite & (jnp.abs(x) >= OVERFLOW)
    x = jnp.where(saturates, jnp.sign(x) * LARGEST, x)
    x = jnp.where(is_finite, x, jnp.nan)  # XLA's conversion on GPUs makes 448 of an infinity
    return x.astype(FLOAT8), descale, saturates.sum(dtype=jnp.int32)


def _rotated(x, lengths, seed):
    """x in float32 with zeros for padding, rotated if there is a seed."""
    if lengths is not None:
        x = jnp.where(mask.inside(lengths, x.shape[1])[..., None, None], x, 0)
    return x.astype(jnp.float32) if seed is None else _rotate(x, seed)


def _scale(x, descale):
    return x / by_row(descale, x.shape[1])[..., None]


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


def spread(scales: dict[str, Any], query: Any, key: Any, value: Any) -> dict[str, jax.Array]:
    """Checked public scales, by their fields of Operands, with those fields' dimensions; the arrays
    have a batch dimension or not."""
    batch = query.shape[0] if query.ndim == 4 else 1

    def by_head(x, array, *blocks):
        blocks = x.shape[-1:] if x.ndim == array.ndim - 1 else blocks
        shape = (batch, array.shape[-2], *blocks)
        return jnp.broadcast_to(x, shape) if x.ndim == 0 else x.reshape(shape)

    whole = dict(zip(DESCALES, ((query, 1), (key, 1), (value,)), strict=True))
    return {name: by_head(x, *whole[name]) for name, x in scales.items()}


def by_row(descale: jax.Array, seqlen: int) -> jax.Array:
    """Scales [batch, heads, blocks] as those of the rows, [batch, seqlen | 1, heads]."""
    if descale.shape[-1] > 1:
        descale = jnp.repeat(descale, BLOCK, axis=-1)[..., :seqlen]
    return jnp.moveaxis(descale, 1, 2)
