"""The public call: checks, static choices, and the layout users see.

From here down everything is 4-D, the scale is positive, windows are numbers, and the choice between
kernels and XLA is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_fa3 import route, score, validate
from jax_fa3.arguments import UNDIVIDED, Arguments, Division
from jax_fa3.float8 import rounding
from jax_fa3.operands import Operands, Outputs, in_row_dims
from jax_fa3.options import AttentionOptions, SequenceParallel
from jax_fa3.visibility import checks, public
from jax_fa3.visibility.table import Visibility
from jax_fa3.vjp import attend

ArrayType = ArrayLike | jax.ShapeDtypeStruct  # an array, or its shape and dtype alone
Function = TypeVar("Function", bound=Callable[..., Any])


def _not_for_flax(function: Function) -> Function:
    """`function`, which names the cure where a layer of Flax is given it for its attention_fn."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "dropout_rate" in kwargs:
            raise TypeError(
                f"{function.__name__} is given Flax's dropout_rate; expected what is not a layer's "
                "attention_fn: pass jax_fa3.flax.attention_fn there, or what "
                "jax_fa3.flax.make_attention_fn gives"
            )
        return function(*args, **kwargs)

    return cast(Function, call)


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
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    kv_start: ArrayLike | None = None,
    kv_end: ArrayLike | None = None,
    attention_chunk: int | None = None,
    visibility: Visibility | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    return_max_logits: Literal[False] = ...,
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
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    kv_start: ArrayLike | None = None,
    kv_end: ArrayLike | None = None,
    attention_chunk: int | None = None,
    visibility: Visibility | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    return_max_logits: Literal[False] = ...,
) -> tuple[jax.Array, jax.Array]: ...


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
    return_residual: bool = ...,
    query_offset: ArrayLike | None = None,
    deterministic: bool | None = None,
    sequence_parallel: SequenceParallel = "auto",
    sm_margin: int = 0,
    forward_dtype: DTypeLike | None = None,
    query_descale: ArrayLike | None = None,
    key_descale: ArrayLike | None = None,
    value_descale: ArrayLike | None = None,
    value_is_prepared: bool = False,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    kv_start: ArrayLike | None = None,
    kv_end: ArrayLike | None = None,
    attention_chunk: int | None = None,
    visibility: Visibility | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    return_max_logits: bool = ...,
) -> jax.Array | tuple[jax.Array, ...]: ...


@_not_for_flax
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
    return_residual: bool = False,
    query_offset: ArrayLike | None = None,
    deterministic: bool | None = None,
    sequence_parallel: SequenceParallel = "auto",
    sm_margin: int = 0,
    forward_dtype: DTypeLike | None = None,
    query_descale: ArrayLike | None = None,
    key_descale: ArrayLike | None = None,
    value_descale: ArrayLike | None = None,
    value_is_prepared: bool = False,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    kv_start: ArrayLike | None = None,
    kv_end: ArrayLike | None = None,
    attention_chunk: int | None = None,
    visibility: Visibility | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    return_max_logits: bool = False,
) -> jax.Array | tuple[jax.Array, ...]:
    """softmax(scale * query @ key^T + bias) @ value, with the arguments of `jax.nn`'s function.

    On Hopper GPUs (H100, H200) bfloat16 and float16 run on this package's FlashAttention-3
    kernels. Everything else runs through XLA, in memory linear in the sequence lengths.

    Letters: B batch, T query rows, S key rows, N query heads, K key/value heads (a divisor of N),
    H head_dim. All lengths, offsets and windows count tokens.

    Args:
      query: (B, T, N, H) or (T, N, H); bfloat16, float16, float32 or float8_e4m3fn.
      key: (B, S, K, H) or (S, K, H), of query's dtype.
      value: (B, S, K, H) or (S, K, H), of query's dtype; its last dimension may differ from H and
        is then the output's.
      bias: floating, broadcastable to (B, N, T, S); added to the scaled scores. The kernels take a
        bias of query's dtype whose last dimension is S. Its gradient is made where it is asked for.
      mask: bool, broadcastable to (B, N, T, S); True where a row sees a key.
      scale: a finite Python number that multiplies the scores; default 1 / sqrt(H).
      is_causal: row i sees keys j <= i + query_offset (top-left aligned, whatever T and S).
      query_seq_lengths: int32 (B,); rows from there on are padding. 3-D inputs: (1,) or ().
        These, the next, query_offset, ids and ends of intervals may be int64 where all values fit
        int32; traced values that do not fit are clamped to it, traced ids illegal.
      key_value_seq_lengths: int32 (B,); keys from there on are padding. 3-D inputs: (1,) or ().
      local_window_size: (left, right), or one int for both: row i sees keys j with
        i + query_offset - left <= j <= i + query_offset + right, both ends included.
      implementation: None takes the kernels where they apply and logs once, with the reason,
        where they do not; "fa3" raises instead; "xla" forces XLA.
      return_residual: also return the log-sum-exp of each row's scores.
      query_offset: int, or int32 of shape () or (B,): the position of row 0 among the keys, for
        causal and windowed attention alike. May be negative. S - T gives bottom-right alignment.
      deterministic: if True, gradients are bitwise reproducible; by default,
        True if XLA_FLAGS has --xla_gpu_deterministic_ops or
        --xla_gpu_exclude_nondeterministic_ops. The forward pass is always reproducible.
      sequence_parallel: for query rows that arrive split over a mesh axis, under jax.jit or with
        explicit sharding: "allgather", "ring" or "ulysses" (see docs/context_parallel.md), "auto"
        picks one of the first two, "error" raises. With a bias, mask or float8 inputs only "auto",
        which gathers.
      sm_margin: streaming multiprocessors that the kernels leave free for what runs beside them,
        such as the collectives of a ring; 0 to 131.
      forward_dtype: "float8_e4m3fn" runs the forward pass of bfloat16 or float16 inputs in float8,
        rotated and with a scale for every 128 rows (see docs/fp8.md); the backward pass is in the
        inputs' type, at the inputs as float8 rounded them, and straight-through. With a bias or
        mask the kernels run it in the inputs' type.
      query_descale, key_descale: factors by which elements of float8 inputs are multiplied,
        positive, float32, (), (B, heads) or (B, heads, blocks), a block being 128 rows; 3-D
        inputs: without B. Default 1. `quantize_qkv` makes inputs and scales.
      value_descale: likewise, () or (B, K).
      value_is_prepared: value has the layout that `quantize_qkv(..., prepare_value=True)` gives,
        which saves the kernels a pass over it.
      query_segment_ids: int32 (B, T), the number of each row's document, which sees itself only;
        3-D inputs: (T,). 0 is padding, which sees nothing and is seen by nobody. Each document is
        one run of rows; numbers are in any order. docs/packed.md says which form to take.
      key_value_segment_ids: int32 (B, S), those of keys, by default query_segment_ids. With it
        numbers do not fall in either, and zeros stand before and behind them only.
      kv_start, kv_end: int32 (B, T), (B, N, T) or (B, K, T): row i sees keys j with kv_start[i] <=
        j < kv_end[i]; either may be missing. 3-D inputs: without B.
      attention_chunk: an int c: row i sees the keys of the chunk of c keys that has its position,
        i + query_offset.
      visibility: the result of `make_visibility`, in place of ids, intervals and chunks.
      logits_soft_cap: a positive Python number c: scores with all that is added to them become
        c * tanh(score / c), before any mask.
      alibi_slopes: float32 (N,); other floating dtypes are cast. `slope * |i + query_offset - j|`
        is subtracted from the scaled scores. Asking for their gradient raises.
      sinks: float32 (N,); other floating dtypes are cast. An additional logit for each row of a
        head, of a key whose value is 0. Differentiable.
      return_max_logits: also return the largest logit that each head sees, the sink apart.

    Returns:
      out, (B, T, N, H) or (T, N, H), of query's dtype, bfloat16 for float8; with return_residual
      or return_max_logits a tuple (out, lse), (out, max_logits) or (out, lse, max_logits).
      lse is float32 (B, T, N) or (T, N), in natural log units, the sink included; gradients flow
      through out and lse. float8 inputs have none. max_logits is float32 (B, N) or (N,), -inf
      where a head sees nothing, and has no gradient.
      A row that sees no key, and every padding row, has out 0, lse -inf and gradients 0; with sinks
      the lse of a row that is no padding is then its sink.

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
      or value stays in its batch and head. With segment ids padding is what stands behind the last
      row and key of all documents. Ids that are no runs give NaN in their batch entry, where they
      are not known until run time.

    Example:
      >>> q = jax.random.normal(jax.random.key(0), (2, 1024, 8, 64), jnp.bfloat16)
      >>> k = v = jax.random.normal(jax.random.key(1), (2, 1024, 2, 64), jnp.bfloat16)
      >>> out = jax_fa3.dot_product_attention(q, k, v, is_causal=True)
      >>> out.shape
      (2, 1024, 8, 64)

    Source: FlashAttention-3, arXiv:2407.08608.
    """
    return attention(Arguments(**locals()))


def is_supported(
    query: ArrayType,
    key: ArrayType,
    value: ArrayType,
    bias: ArrayType | None = None,
    mask: ArrayType | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayType | None = None,
    key_value_seq_lengths: ArrayType | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    query_offset: ArrayType | None = None,
    deterministic: bool | None = None,
    sequence_parallel: SequenceParallel = "auto",
    sm_margin: int = 0,
    forward_dtype: DTypeLike | None = None,
    query_descale: ArrayType | None = None,
    key_descale: ArrayType | None = None,
    value_descale: ArrayType | None = None,
    value_is_prepared: bool = False,
    query_segment_ids: ArrayType | None = None,
    key_value_segment_ids: ArrayType | None = None,
    kv_start: ArrayType | None = None,
    kv_end: ArrayType | None = None,
    attention_chunk: int | None = None,
    visibility: Visibility | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: ArrayType | None = None,
    sinks: ArrayType | None = None,
    return_max_logits: bool = False,
) -> str | None:
    """Why `dot_product_attention` would not run a call on the Hopper kernels; None if it would.

    Args: those of `dot_product_attention`, each array also as a `jax.ShapeDtypeStruct`.

    Returns:
      None when forward and backward of this call run on the kernels here, else the reason.

    Raises:
      ValueError, TypeError: as `dot_product_attention` does for the same arguments.

    Example:
      >>> x = jax.ShapeDtypeStruct((2, 1024, 16, 128), "float32")
      >>> jax_fa3.is_supported(x, x, x)
      'the kernels take bfloat16 or float16, not float32'
    """
    return reasons_against(Arguments(**locals())).first


def attention(arguments: Arguments) -> jax.Array | tuple[jax.Array, ...]:
    """`dot_product_attention` of these arguments."""
    options, operands = prepare(arguments)
    return public_results(fa3_attention(options, operands))


def reasons_against(arguments: Arguments) -> route.Reasons:
    """Why the kernels would not run a call of these arguments, if there is a reason."""
    arguments = checked(arguments)
    return route.reasons_of(arguments, arguments.options())


def prepare(arguments: Arguments) -> tuple[AttentionOptions, Operands]:
    """`prepared` of these arguments, once they are checked."""
    return prepared(checked(arguments))


def checked(arguments: Arguments, division: Division = UNDIVIDED) -> Arguments:
    """The arguments, which are legal, with an array wherever something stood for one."""
    arguments = arguments.with_arrays()
    validate.check_call(arguments)
    checks.check_call(arguments, division)
    return arguments


def prepared(
    arguments: Arguments, division: Division = UNDIVIDED
) -> tuple[AttentionOptions, Operands]:
    """The static choices of checked arguments; the arrays are still the user's, but for the scales,
    which have their rows' dimensions, and the sign of the scale, which query has."""
    options = route.decide(arguments, arguments.options())
    query, arrays = arguments.query, dict(arguments.arrays)
    if arguments.is_float8:
        scales = {name: arrays.get(name, jnp.float32(1)) for name in rounding.DESCALES}
        arrays |= rounding.spread(scales, query, arguments.key, arguments.plain_value)
    if "visibility" in arrays:
        arrays["visibility"] = public.of_call(arguments, division)
    scale = score.resolve_scale(arguments.scale, query.shape[-1])
    arrays["query"] = score.carry_sign(query, scale)
    return options, arguments.Operands(**arrays)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def fa3_attention(options: AttentionOptions, operands: Operands) -> Outputs:
    """attend() in the layout that users see, compiled once when called outside of jax.jit. Programs
    and profiles show its name."""
    with jax.named_scope("fa3_attention"):  # of jit's own name nothing stays where it is inlined
        return in_public_layout(functools.partial(attend, options), operands)


def in_public_layout(core: Callable[[Operands], Outputs], operands: Operands) -> Outputs:
    """core(operands), of operands whose shapes are the user's, with or without a batch dimension;
    the LSE's heads come last."""
    outputs = core(in_row_dims(operands))
    if outputs.lse is not None:
        outputs = outputs.replace(lse=jnp.moveaxis(outputs.lse, 1, 2))
    return outputs if operands.is_batched else jax.tree.map(lambda x: x[0], outputs)


def public_results(outputs: Outputs) -> jax.Array | tuple[jax.Array, ...]:
    """out, or a tuple of it and what else was asked for."""
    results = tuple(outputs.present().values())
    return results if len(results) > 1 else results[0]
