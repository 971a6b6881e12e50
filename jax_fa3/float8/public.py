"""`quantize_qkv`: checks, and the choice between kernel and XLA.

Kernels round if they can (`_may_use_kernel`), as in `forward_dtype`; otherwise XLA rounds. Both are
straight-through.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, TypedDict, Unpack, get_args, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_fa3 import route, sharding, validate, values
from jax_fa3.arguments import Arguments
from jax_fa3.float8 import rounding
from jax_fa3.float8.rounding import SEED, Granularity, QuantizedQKV, Saturated
from jax_fa3.operands import Operands, in_row_dims
from jax_fa3.varying import vary_together


class _Options(TypedDict, total=False):
    """The keywords of `quantize_qkv` that do not change the type of its result."""

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
    """Rounds query, key and value to float8, with scales, for `dot_product_attention`.

    Args:
      query, key, value: as in `dot_product_attention`; bfloat16, float16 or float32.
      granularity: the elements that share a scale: "tensor", the whole array; "head", a (batch,
        head); "block", 128 rows of a (batch, head) in query and key, and a (batch, head) in value.
      rotation_seed: the seed of the random signs of the rotation of query and key. The same seed
        and head_dim always give the same rotation, in every version. None means no rotation.
        Queries and the keys that they attend to must have the same seed.
      prepare_value: return value in the layout of the kernels, keys innermost (docs/fp8.md), for
        `dot_product_attention(..., value_is_prepared=True)`, which then does not transpose it.
      query_seq_lengths, key_value_seq_lengths: int32 (B,), the numbers of rows of each sequence;
        later rows are padding, which does not affect scales and becomes 0.
      query_descale, key_descale, value_descale: positive float32 scales of the rotated arrays, in
        place of measured scales, with the shapes that `dot_product_attention` takes.
      return_saturated: also return the number of elements that were cut to the largest float8
        number, 448 times the scale. With measured scales the number is 0.

    Returns:
      `QuantizedQKV`; with return_saturated, a pair of `QuantizedQKV` and `Saturated`.

    Raises:
      ValueError, TypeError: an argument does not fit; the message names the argument, the value it
        got and the expected value.

    Numerics:
      Rotation and scaling are in float32. NaN and infinity become NaN (e4m3 has no infinity) and do
      not affect scales. The size of the rotation's Hadamard blocks is the largest power of two that
      divides head_dim: 128 for 128, 64 for 64 and 192, 32 for 96.

    Derivative:
      Straight-through: rounding passes the gradient through, saturated elements have gradient 0,
      and scales are constants. JAX gives float8 arrays float8 cotangents, which are too coarse for
      training: use `dot_product_attention(..., forward_dtype="float8_e4m3fn")` there.

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
    values.check_choice(get_args(Granularity), "granularity", granularity)
    values.check_seed("rotation_seed", rotation_seed)
    values.check_flag("prepare_value", prepare_value)
    values.check_flag("return_saturated", return_saturated)
    how = _How(granularity, rotation_seed, bool(prepare_value))
    quantized, saturated = _run(how, Operands(**arguments.arrays))
    fields = {name: x for name, x in quantized.present().items() if name != "prepared_value"}
    value = quantized.value if quantized.prepared_value is None else quantized.prepared_value
    results = QuantizedQKV(**fields | dict(value=value))
    return (results, saturated) if return_saturated else results


class _How(NamedTuple):
    """The static options of rounding."""

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
        # A measured scale maps the largest element to 448, up to rounding; elements are cut from
        # 464 on.
        saturated = Saturated(*[jnp.int32(0)] * 3)
    else:
        quantized, saturated = rounding.quantize(operands, how.granularity, how.seed)
        quantized = rounding.prepared(quantized) if how.prepare_value else quantized
    if not is_batched:
        quantized = jax.tree.map(lambda x: x[0], quantized)
    return quantized, saturated


def _may_use_kernel(how: _How, operands: Operands) -> bool:
    """Whether the platform of the lowering may choose between kernel and XLA. The conditions here
    hold on all platforms."""
    # In a jax.shard_map each result varies over the mesh axes of its operand, but all results of
    # one custom call vary over the same axes.
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
    """float8 arrays with measured block scales, by kernel or XLA."""
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
