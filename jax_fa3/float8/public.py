"""The public way to float8 arrays: checks, and who rounds.

Kernels round where they can (`_may_use_kernel`), as they do within `forward_dtype`, and XLA
everywhere else. Both ways are straight-through.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, TypedDict, Unpack, get_args, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_fa3 import route, sharding, validate
from jax_fa3.arguments import Arguments
from jax_fa3.float8 import rounding
from jax_fa3.float8.rounding import SEED, Granularity, QuantizedQKV, Saturated
from jax_fa3.operands import Operands, in_row_dims
from jax_fa3.varying import vary_together


class _Options(TypedDict, total=False):
    """The keywords of `quantize_qkv` that leave the type of its result alone."""

    granularity: Granularity
    rotation_seed: int | None
    prepare_value: bool
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    query_descale: ArrayLike | None
    key_descale: ArrayLike | None
    value_descale: ArrayLike | None


@overload
def quantize_qkv(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    return_saturated: Literal[False] = ...,
    **options: Unpack[_Options],
) -> QuantizedQKV: ...


@overload
def quantize_qkv(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    return_saturated: Literal[True],
    **options: Unpack[_Options],
) -> tuple[QuantizedQKV, Saturated]: ...


@overload
def quantize_qkv(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    return_saturated: bool,
    **options: Unpack[_Options],
) -> QuantizedQKV | tuple[QuantizedQKV, Saturated]: ...


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
) -> QuantizedQKV | tuple[QuantizedQKV, Saturated]:
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
    given: dict[str, ArrayLike | None] = dict(
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        query_descale=query_descale,
        key_descale=key_descale,
        value_descale=value_descale,
    )
    arguments = Arguments(query, key, value, **given).with_arrays()
    validate.check_heads(arguments.query, arguments.key, arguments.value)
    validate.check_arrays(arguments)
    validate.check_choice("granularity", granularity, get_args(Granularity))
    validate.check_seed("rotation_seed", rotation_seed)
    validate.check_flag("prepare_value", prepare_value)
    validate.check_flag("return_saturated", return_saturated)
    how = _How(granularity, rotation_seed, bool(prepare_value))
    quantized, saturated = _run(how, Operands(**arguments.arrays))
    fields = {name: x for name, x in quantized.present().items() if name != "prepared_value"}
    value = quantized.value if quantized.prepared_value is None else quantized.prepared_value
    results = QuantizedQKV(**fields | dict(value=value))
    return (results, saturated) if return_saturated else results


class _How(NamedTuple):
    """The static choices of rounding."""

    granularity: Granularity
    seed: int | None
    prepare_value: bool


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _run(how: _How, operands: Operands) -> tuple[Operands, Saturated]:
    """quantize() with or without a batch dimension, compiled once outside of jax.jit."""
    scales = operands.only(rounding.DESCALES).present()
    spread = rounding.spread(scales, operands.query, operands.key, operands.value)
    is_batched = operands.is_batched
    operands = in_row_dims(operands.replace(**spread))
    if _may_use_kernel(how, operands):
        quantized = _measured(how, operands)
        # A measured scale brings the largest element to 448, give or take a rounding; elements are
        # cut from 464 on.
        saturated = Saturated(*[jnp.int32(0)] * 3)
    else:
        quantized, saturated = rounding.quantize(operands, how.granularity, how.seed)
        quantized = rounding.prepared(quantized) if how.prepare_value else quantized
    if not is_batched:
        quantized = jax.tree.map(lambda x: x[0], quantized)
    return quantized, saturated


def _may_use_kernel(how: _How, operands: Operands) -> bool:
    """Whether to leave the choice of kernel or XLA to the platform that the program is lowered
    for. What is said here holds on all of them."""
    # In a jax.shard_map results vary over the mesh axes of their operand, those of one custom call
    # all alike.
    arrays = operands.only(rounding.ARRAYS).present().values()
    varying = {jax.typeof(x).manual_axis_type.varying for x in arrays}
    return (
        how.granularity == "block"
        and how.seed is not None
        and not operands.only(rounding.DESCALES).present()
        and len(varying) == 1
        and route.kernels_round(operands)
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _measured(how: _How, operands: Operands) -> Operands:
    """float8 arrays with measured scales by blocks, by whoever rounds."""
    assert how.seed is not None  # _may_use_kernel
    return sharding.quantized(
        vary_together(operands), seed=how.seed, prepare_value=how.prepare_value
    )


@_measured.defjvp
def _straight_through(
    how: _How, primals: tuple[Operands], tangents: tuple[Operands]
) -> tuple[Operands, Operands]:
    (operands,), (directions,) = primals, tangents
    results = _measured(how, operands)
    arrays = rounding.straight_through(directions, operands, results, how.seed)
    arrays = rounding.prepared(arrays) if how.prepare_value else arrays
    typed = {
        name: sharding.typed_like(x, getattr(results, name)) for name, x in arrays.present().items()
    }
    return results, jax.tree.map(jnp.zeros_like, results).replace(**typed)
