"""The public call: checks, static choices, and the layout users see.

From here down everything is 4-D, the scale is positive, windows and offsets are numbers, and the
choice between kernels and XLA is made.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_fa3 import quantize, support, validate
from jax_fa3.options import (
    FLOAT8,
    AttentionOptions,
    Dense,
    Descales,
    Index,
    Route,
    SequenceParallel,
    resolve_deterministic,
    resolve_window,
)
from jax_fa3.vjp import attend


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["fa3", "xla"] | None = None,
    return_residual: Literal[False] = ...,
    query_offset: ArrayLike | None = None,
    deterministic: bool | None = None,
    sequence_parallel: SequenceParallel = "auto",
    sm_margin: int = 0,
    forward_dtype: DTypeLike | None = None,
    query_descale: ArrayLike | None = None,
    key_descale: ArrayLike | None = None,
    value_descale: ArrayLike | None = None,
    value_is_prepared: bool = False,
) -> jax.Array: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["fa3", "xla"] | None = None,
    return_residual: Literal[True],
    query_offset: ArrayLike | None = None,
    deterministic: bool | None = None,
    sequence_parallel: SequenceParallel = "auto",
    sm_margin: int = 0,
    forward_dtype: DTypeLike | None = None,
    query_descale: ArrayLike | None = None,
    key_descale: ArrayLike | None = None,
    value_descale: ArrayLike | None = None,
    value_is_prepared: bool = False,
) -> tuple[jax.Array, jax.Array]: ...


def dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    implementation=None,
    return_residual=False,
    query_offset=None,
    deterministic=None,
    sequence_parallel="auto",
    sm_margin=0,
    forward_dtype=None,
    query_descale=None,
    key_descale=None,
    value_descale=None,
    value_is_prepared=False,
):
    """softmax(scale * query @ key^T + bias) @ value, as `jax.nn.dot_product_attention` has it.

    On Hopper GPUs (H100, H200) bfloat16 and float16 run on this package's FlashAttention-3
    kernels; everything else runs the same meaning through XLA, block by block, in memory linear
    in the sequence lengths.

    Letters: B batch, T query rows, S key rows, N query heads, K key/value heads (a divisor of N),
    H head_dim. All lengths, offsets and windows count tokens.

    Args:
      query: (B, T, N, H) or (T, N, H); bfloat16, float16, float32 or float8_e4m3fn.
      key: (B, S, K, H) or (S, K, H), of query's dtype.
      value: (B, S, K, H) or (S, K, H), of query's dtype; its last dimension may differ from H and
        is then the output's.
      bias: floating, broadcastable to (B, N, T, S); added to the scaled scores. Runs through XLA.
      mask: bool, broadcastable to (B, N, T, S); True where a row sees a key. Runs through XLA.
      scale: a finite Python number that multiplies the scores; default 1 / sqrt(H).
      is_causal: row i sees keys j <= i + query_offset (top-left aligned, whatever T and S).
      query_seq_lengths: int32 (B,); rows from there on are padding. 3-D inputs: (1,) or ().
      key_value_seq_lengths: int32 (B,); keys from there on are padding. 3-D inputs: (1,) or ().
      local_window_size: (left, right), or one int for both: row i sees keys j with
        i + query_offset - left <= j <= i + query_offset + right, both ends included.
      implementation: None takes the kernels where they apply and logs once, with the reason,
        where they do not; "fa3" raises instead; "xla" forces XLA.
      return_residual: also return the log-sum-exp of each row's scores.
      query_offset: int, or int32 of shape () or (B,): the position of row 0 among the keys, for
        causal and windowed attention alike. May be negative. S - T gives bottom-right alignment.
      deterministic: whether the gradients have equal bits each time; default: whether XLA_FLAGS
        has --xla_gpu_deterministic_ops or --xla_gpu_exclude_nondeterministic_ops. The forward
        pass always has.
      sequence_parallel: for query rows that arrive split over a mesh axis, under jax.jit or with
        explicit sharding: "allgather", "ring" or "ulysses" (see docs/context_parallel.md), "auto"
        picks one of the first two, "error" raises. With a bias, mask or float8 inputs only "auto",
        which gathers.
      sm_margin: streaming multiprocessors that the kernels leave free for what runs beside them,
        such as the collectives of a ring; 0 to 131.
      forward_dtype: "float8_e4m3fn" runs the forward pass of bfloat16 or float16 inputs in float8,
        rotated and with a scale for every 128 rows (see docs/fp8.md); the backward pass is in the
        inputs' type, at the inputs as float8 rounded them, and straight-through.
      query_descale, key_descale: of float8 inputs, what their elements are to be multiplied by:
        positive, float32, (), (B, heads) or (B, heads, blocks), a block being 128 rows; 3-D
        inputs: without B. Default 1. `quantize_qkv` makes inputs and scales.
      value_descale: likewise, () or (B, K).
      value_is_prepared: value is as `quantize_qkv(..., prepare_value=True)` has it, which spares
        the kernels a pass over it.

    Returns:
      out, (B, T, N, H) or (T, N, H), of query's dtype, bfloat16 for float8; with return_residual
      (out, lse), where lse is float32 (B, T, N) or (T, N), in natural log units, and gradients flow
      through both. float8 inputs have none.
      A row that sees no key, and every padding row, has out 0, lse -inf and gradients 0.

    Raises:
      ValueError: shapes or values do not fit; the message names the argument, got and expected.
      TypeError: a wrong dtype, or an array where a Python value must stand.
      NotImplementedError: implementation="fa3" and the kernels cannot run the call; the message
        has the reason, as does `jax_fa3.is_supported`.

    Numerics:
      Products accumulate in float32, the softmax is in float32, and probabilities are rounded to
      the input dtype before they multiply value (in float8 as 64 to 256 times themselves).
      Gradients of shared key/value heads are summed in float32. Whatever padding holds, NaN
      included, reaches no result. A NaN in a used query row stays in that row; one in a used key
      or value stays in its batch and head.

    Example:
      >>> q = jax.random.normal(jax.random.key(0), (2, 1024, 8, 64), jnp.bfloat16)
      >>> k = v = jax.random.normal(jax.random.key(1), (2, 1024, 2, 64), jnp.bfloat16)
      >>> out = jax_fa3.dot_product_attention(q, k, v, is_causal=True)
      >>> out.shape
      (2, 1024, 8, 64)

    Source: FlashAttention-3, arXiv:2407.08608.
    """
    options, *operands = prepare(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        implementation=implementation,
        return_residual=return_residual,
        query_offset=query_offset,
        deterministic=deterministic,
        sequence_parallel=sequence_parallel,
        sm_margin=sm_margin,
        forward_dtype=forward_dtype,
        query_descale=query_descale,
        key_descale=key_descale,
        value_descale=value_descale,
        value_is_prepared=value_is_prepared,
    )
    results = _run(options, bool(return_residual), *operands)
    return results if return_residual else results[0]


class Call(NamedTuple):
    """A checked call: its static choices and its arrays, as the layers below take them."""

    options: AttentionOptions
    query: jax.Array
    key: jax.Array
    value: jax.Array
    index: Index
    dense: Dense
    descales: Descales


def prepare(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale,
    is_causal,
    query_seq_lengths,
    key_value_seq_lengths,
    local_window_size,
    implementation,
    return_residual,
    query_offset,
    deterministic,
    sequence_parallel="auto",
    sm_margin=0,
    forward_dtype=None,
    query_descale=None,
    key_descale=None,
    value_descale=None,
    value_is_prepared=False,
) -> Call:
    """Checks the arguments of `dot_product_attention` and makes the static choices."""
    arrays = {"query": query, "key": key, "value": value, "bias": bias, "mask": mask}
    query, key, value, bias, mask = (validate.as_array(*item) for item in arrays.items())
    query_lengths = validate.as_array("query_seq_lengths", query_seq_lengths)
    key_lengths = validate.as_array("key_value_seq_lengths", key_value_seq_lengths)
    descales = Descales(
        validate.as_array("query_descale", query_descale),
        validate.as_array("key_descale", key_descale),
        validate.as_array("value_descale", value_descale),
    )
    validate.check_call(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        local_window_size=local_window_size,
        implementation=implementation,
        return_residual=return_residual,
        query_offset=query_offset,
        deterministic=deterministic,
        sequence_parallel=sequence_parallel,
        sm_margin=sm_margin,
        forward_dtype=forward_dtype,
        query_descale=descales.query,
        key_descale=descales.key,
        value_descale=descales.value,
        value_is_prepared=value_is_prepared,
    )
    plain = validate.plain_value(key, value, value_is_prepared)
    scale = float(np.float32(1 / math.sqrt(query.shape[-1]) if scale is None else scale))
    window = resolve_window(local_window_size, is_causal)
    deterministic = resolve_deterministic(deterministic)
    has_offset_array = hasattr(query_offset, "dtype") and not isinstance(query_offset, np.integer)
    options = AttentionOptions(
        scale=abs(scale) or 1.0,
        window_left=window[0],
        window_right=window[1],
        query_offset=0 if has_offset_array else int(query_offset or 0),
        deterministic=deterministic,
        has_query_lengths=query_lengths is not None,
        has_key_lengths=key_lengths is not None,
        has_query_offset=has_offset_array,
        route=_route(
            implementation,
            query,
            key,
            plain,
            bias,
            mask,
            scale,
            window,
            deterministic,
            forward_dtype,
            value_is_prepared,
        ),
        sequence_parallel=sequence_parallel,
        sm_margin=int(sm_margin),
        quantized_forward=forward_dtype is not None,
        value_is_prepared=bool(value_is_prepared),
    )
    if query.dtype.name == FLOAT8:
        ones = (jnp.float32(1) if x is None else x for x in descales)
        descales = quantize.spread(query, key, plain, Descales(*ones))
    if scale <= 0:  # the kernels' scale is positive: the sign, or zero, goes into the query
        query = query * np.sign(scale).astype(query.dtype)
    index = Index(query_lengths, key_lengths, query_offset if has_offset_array else None)
    return Call(options, query, key, value, index, Dense(bias, mask), descales)


def _route(
    implementation,
    query,
    key,
    value,
    bias,
    mask,
    scale,
    window,
    deterministic,
    forward_dtype,
    value_is_prepared,
) -> Route:
    """Kernels or XLA. "auto" leaves the choice to the platform the program is lowered for."""
    if implementation == "xla":
        return "xla"
    call_reason = support.call_reason(query, bias, mask, scale) or support.plan_reason(
        query, key, value, window, deterministic
    )
    float8_reason = support.float8_reason(
        query, key, value, window, forward_dtype, value_is_prepared
    )
    device_reason = support.device_reason()
    reason = call_reason or float8_reason or device_reason
    if reason is None:
        return "auto" if implementation is None else "fa3"
    if implementation == "fa3":
        raise NotImplementedError(
            f"implementation is 'fa3', which cannot run this call: {reason}. implementation=None "
            "or 'xla' runs it through XLA."
        )
    support.log_fallback(reason)
    # Where only float8 has no kernel, "auto" leaves the backward pass to the kernels.
    return "xla" if call_reason or (device_reason and support.has_gpu()) else "auto"


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _run(options, return_lse, *operands):
    """attend() in the layout that users see, compiled once when called outside of jax.jit."""
    return in_public_layout(functools.partial(attend, options, return_lse), *operands)


def in_public_layout(
    core: Callable[..., tuple[jax.Array, ...]],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: Index,
    dense: Dense,
    descales: Descales,
) -> tuple[jax.Array, ...]:
    """core(query, key, value, index, dense, descales), (out,) or (out, lse), with or without a
    batch dimension, index arrays of any rank, and an lse whose heads come last.
    """
    unbatched = query.ndim == 3
    if unbatched:
        query, key, value = query[None], key[None], value[None]
    batch = query.shape[0]
    index = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch,)), index)
    dense = jax.tree.map(lambda x: x.reshape((1,) * (4 - x.ndim) + x.shape), dense)
    out, *lse = core(query, key, value, index, dense, descales)
    results = (out, *(jnp.moveaxis(x, 1, 2) for x in lse))
    return tuple(x[0] for x in results) if unbatched else results
