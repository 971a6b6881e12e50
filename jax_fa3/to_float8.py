"""The public way to float8 arrays: checks, and who rounds.

Kernels round where they can (`_by_kernel`), as they do within `forward_dtype`, and XLA everywhere
else. Both ways are straight-through.
"""

from __future__ import annotations

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_fa3 import quantize, sharding, support, validate
from jax_fa3.context.layout import vary_together
from jax_fa3.options import Descales, Index
from jax_fa3.quantize import SEED, Granularity, QuantizedQKV, Saturated


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
    given = quantize.spread(query, key, value, descales)
    unbatched = query.ndim == 3
    if unbatched:
        query, key, value = query[None], key[None], value[None]
    index = jax.tree.map(lambda x: jnp.broadcast_to(x, query.shape[:1]), index)
    if _by_kernel(how, query, key, value, given):
        quantized = QuantizedQKV(*_measured(seed, prepare, query, key, value, index))
        # A measured scale brings the largest element to 448, give or take a rounding; elements are
        # cut from 464 on.
        saturated = Saturated(*[jnp.int32(0)] * 3)
    else:
        quantized, saturated = quantize.quantize(query, key, value, index, granularity, seed, given)
        if prepare:
            quantized = quantized._replace(value=quantize.prepare_value(quantized.value))
    return jax.tree.map(lambda x: x[0], quantized) if unbatched else quantized, saturated


def _by_kernel(how, query, key, value, given) -> bool:
    """Whether to leave the choice of kernel or XLA to the platform that the program is lowered
    for: calls.py's matter. What is said here holds on all of them."""
    granularity, seed, _ = how
    # In a jax.shard_map results vary over the mesh axes of their operand, those of one custom call
    # all alike.
    varying = {jax.typeof(x).manual_axis_type.varying for x in (query, key, value)}
    return (
        query.dtype.name in support.KERNEL_DTYPES
        and granularity == "block"
        and seed is not None
        and all(x is None for x in given)
        and len(varying) == 1
        and not support.quantize_reason(query, key, value)
        and not (support.has_gpu() and support.device_reason())
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _measured(seed, prepare, query, key, value, index):
    """The arrays of QuantizedQKV, by blocks, by whoever rounds."""
    return sharding.quantized(seed, prepare, *vary_together((query, key, value, index)))


@_measured.defjvp
def _straight_through(seed, prepare, primals, tangents):
    results = _measured(seed, prepare, *primals)
    descales = Descales(*results[3:])
    *rows, value = quantize.tangents(*tangents[:3], primals[3], descales, seed)
    arrays = (*rows, quantize.prepare_value(value) if prepare else value)
    arrays = map(sharding.typed_like, arrays, results)
    return results, (*arrays, *map(jnp.zeros_like, descales))
