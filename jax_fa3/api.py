"""The public call: checks, static options, and the public array layout.

Below this layer all arrays are 4-D, the scale is positive, windows are numbers, and each call is
assigned to the kernels or to XLA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast, overload

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

ArrayType = ArrayLike | jax.ShapeDtypeStruct  # an array, or only its shape and dtype
Function = TypeVar("Function", bound=Callable[..., Any])


def _not_for_flax(function: Function) -> Function:
    """Adds an error with the cure for a Flax layer that gets `function` as its attention_fn."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "dropout_rate" in kwargs:
            raise TypeError(
                f"{function.__name__} is given Flax's dropout_rate; expected no keyword of Flax: "
                "as the attention_fn of a layer pass jax_fa3.flax.attention_fn, or a function from "
                "jax_fa3.flax.make_attention_fn"
            )
        return function(*args, **kwargs)

    return cast(Function, call)


class Keywords(TypedDict, total=False):
    """What `dot_product_attention` and its forms for divided sequences take by name, but for what
    changes the type of the results."""

    scale: float | None
    is_causal: bool
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    local_window_size: int | tuple[int, int] | None
    implementation: Literal["fa3", "xla"] | None
    query_offset: ArrayLike | None
    deterministic: bool | None
    sm_margin: int
    forward_dtype: DTypeLike | None
    query_segment_ids: ArrayLike | None
    key_value_segment_ids: ArrayLike | None
    kv_start: ArrayLike | None
    kv_end: ArrayLike | None
    attention_chunk: int | None
    visibility: Visibility | None
    logits_soft_cap: float | None
    alibi_slopes: ArrayLike | None
    sinks: ArrayLike | None


class WholeKeywords(Keywords, total=False):
    """Those of `dot_product_attention`, of whole sequences."""

    sequence_parallel: SequenceParallel
    query_descale: ArrayLike | None
    key_descale: ArrayLike | None
    value_descale: ArrayLike | None
    value_is_prepared: bool


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    return_residual: Literal[False] = ...,
    return_max_logits: Literal[False] = ...,
    **keywords: Unpack[WholeKeywords],
) -> jax.Array: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    return_residual: Literal[True],
    return_max_logits: Literal[False] = ...,
    **keywords: Unpack[WholeKeywords],
) -> tuple[jax.Array, jax.Array]: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    return_residual: bool = ...,
    return_max_logits: bool = ...,
    **keywords: Unpack[WholeKeywords],
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

    On Hopper GPUs (H100, H200), bfloat16 and float16 calls run on this package's FlashAttention-3
    kernels. Other calls run through XLA, in memory linear in the sequence lengths.

    Letters: B batch, T query rows, S keys, N query heads, K key/value heads (a divisor of N),
    H head_dim. All lengths, offsets and windows count tokens.

    Args:
      query: (B, T, N, H) or (T, N, H); bfloat16, float16, float32 or float8_e4m3fn.
      key: (B, S, K, H) or (S, K, H), of query's dtype.
      value: (B, S, K, H) or (S, K, H), of query's dtype; its last dimension may differ from H, and
        the output then has the same last dimension.
      bias: floating, broadcastable to (B, N, T, S); added to the scaled scores. The kernels take a
        bias of query's dtype whose last dimension is S. Its gradient is computed only if requested.
      mask: bool, broadcastable to (B, N, T, S); True if the row sees the key.
      scale: a finite Python number that multiplies the scores; default 1 / sqrt(H).
      is_causal: row i sees keys j <= i + query_offset (top-left aligned for all T and S).
      query_seq_lengths: int32 (B,), the number of rows of each sequence; later rows are padding.
        3-D inputs: (1,) or (). All index arrays of this function may be int64 if their values fit
        int32. Traced values that do not fit are clamped to int32; traced ids are then invalid.
      key_value_seq_lengths: int32 (B,), the number of keys of each sequence; later keys are
        padding. 3-D inputs: (1,) or ().
      local_window_size: (left, right), or one int for both: row i sees keys j with
        i + query_offset - left <= j <= i + query_offset + right, both ends included.
      implementation: None runs the kernels if they support the call, and otherwise runs XLA and
        logs the reason once; "fa3" raises instead; "xla" forces XLA.
      return_residual: also return the log-sum-exp of each row's scores.
      query_offset: int, or int32 of shape () or (B,): the position of row 0 among the keys, for
        causal and windowed attention. May be negative. S - T gives bottom-right alignment.
      deterministic: if True, gradients are bitwise reproducible; by default,
        True if XLA_FLAGS has --xla_gpu_deterministic_ops or
        --xla_gpu_exclude_nondeterministic_ops. The forward pass is always reproducible.
      sequence_parallel: the strategy for query rows that arrive split over a mesh axis, under
        jax.jit or with explicit sharding: "allgather", "ring" or "ulysses" (see
        docs/context_parallel.md). "auto" selects one of the first two, and "error" raises. Calls
        with a bias, mask or float8 inputs take only "auto", which then gathers the sequence.
      sm_margin: the number of streaming multiprocessors, 0 to 131, that the kernels leave free for
        other work, such as the collectives of a ring.
      forward_dtype: "float8_e4m3fn" runs the forward pass of bfloat16 or float16 inputs in float8,
        rotated and with a scale for every 128 rows (see docs/fp8.md). The backward pass runs in the
        dtype of the inputs, uses the rounded inputs, and is straight-through. With a bias or mask,
        the forward pass also runs in the dtype of the inputs.
      query_descale, key_descale: factors that multiply the elements of float8 inputs: positive,
        float32, of shape (), (B, heads) or (B, heads, blocks) with blocks of 128 rows; 3-D
        inputs: without B. Default 1. `quantize_qkv` makes inputs and scales.
      value_descale: the same for value, of shape () or (B, K).
      value_is_prepared: True if value has the layout of `quantize_qkv(..., prepare_value=True)`,
        which saves the kernels a pass over value.
      query_segment_ids: int32 (B, T), the id of each row's document; a row sees only keys of its
        document. 3-D inputs: (T,). 0 is padding: a padding row sees no key, and no row sees a
        padding key. The rows of a document are adjacent; ids may be in any order. docs/packed.md
        says which form to use.
      key_value_segment_ids: int32 (B, S), the id of each key's document; default
        query_segment_ids. If another array is given, nonzero ids must not decrease in either
        array, and zeros must come before or after all nonzero ids.
      kv_start, kv_end: int32 (B, T), (B, N, T) or (B, K, T): row i sees keys j with kv_start[i] <=
        j < kv_end[i]; one of the two may be omitted. 3-D inputs: without B.
      attention_chunk: an int c: row i sees the keys of the chunk of c keys that contains position
        i + query_offset.
      visibility: the result of `make_visibility`, in place of ids, intervals and chunks.
      logits_soft_cap: a positive Python number c: each score, with bias and slopes added, becomes
        c * tanh(score / c), before any mask.
      alibi_slopes: float32 (N,); other floating dtypes are cast. `slope * |i + query_offset - j|`
        is subtracted from the scaled scores. Differentiating the slopes raises.
      sinks: float32 (N,); other floating dtypes are cast. For each row of a head, the sink is an
        additional logit of a key whose value is 0. Differentiable.
      return_max_logits: also return the largest visible logit of each head, without the sink.

    Returns:
      out, (B, T, N, H) or (T, N, H), of query's dtype, bfloat16 for float8; with return_residual
      or return_max_logits a tuple (out, lse), (out, max_logits) or (out, lse, max_logits).
      lse is float32 (B, T, N) or (T, N), in natural log units, and includes the sink. Gradients
      flow through out and lse, but float8 inputs have no gradients. max_logits is float32 (B, N) or
      (N,), -inf if the head sees no key, and has no gradient.
      A row that sees no key, and every padding row, has out 0, lse -inf and gradients 0. With
      sinks, a row that sees no key and is not padding has its sink as lse.

    Raises:
      ValueError: shapes or values do not fit; the message names the argument, the value it got and
        the expected value.
      TypeError: a wrong dtype, or an array in place of a Python value.
      NotImplementedError: implementation="fa3" and the kernels cannot run the call; the message
        gives the reason, like `jax_fa3.is_supported`.

    Numerics:
      Products accumulate in float32, the softmax is in float32, and probabilities are rounded to
      the input dtype before they multiply value (to float8, after multiplication by 64 to 256).
      Gradients of shared key/value heads are summed in float32. Values in padding, including NaN,
      reach no result. A NaN in a used query row stays in that row; a NaN in a used key or value
      stays in its batch entry and head. With segment ids, padding is the rows and keys after the
      last document. If ids that are only known at run time break the rules, the results of their
      batch entry are NaN.

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
    """The reason why the Hopper kernels would not run a call, or None if they would.

    Args: the arguments of `dot_product_attention`; each array may be a `jax.ShapeDtypeStruct`.

    Returns:
      None if the kernels run the forward and backward pass of this call here, otherwise the reason.

    Raises:
      ValueError, TypeError: as `dot_product_attention` with the same arguments.

    Example:
      >>> x = jax.ShapeDtypeStruct((2, 1024, 16, 128), "float32")
      >>> jax_fa3.is_supported(x, x, x)
      'the kernels take bfloat16 or float16, not float32'
    """
    return reasons_against(Arguments(**locals())).first


def attention(arguments: Arguments) -> jax.Array | tuple[jax.Array, ...]:
    """`dot_product_attention` with these arguments."""
    options, operands = prepare(arguments)
    return public_results(fa3_attention(options, operands))


def reasons_against(arguments: Arguments) -> route.Reasons:
    """The reasons why the kernels would not run a call with these arguments, if any."""
    arguments = checked(arguments)
    return route.reasons_of(arguments, arguments.options())


def prepare(arguments: Arguments) -> tuple[AttentionOptions, Operands]:
    """Checks the arguments, then returns `prepared`."""
    return prepared(checked(arguments))


def checked(arguments: Arguments, division: Division = UNDIVIDED) -> Arguments:
    """The arguments as arrays; raises unless they are valid."""
    arguments = arguments.with_arrays()
    validate.check_call(arguments)
    checks.check_call(arguments, division)
    return arguments


def prepared(
    arguments: Arguments, division: Division = UNDIVIDED
) -> tuple[AttentionOptions, Operands]:
    """The static options and the operands of checked arguments. The arrays keep the user's shapes,
    except that descales get the dimensions of their rows and query gets the sign of the scale."""
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
    """attend() in the public layout, compiled once when called outside of jax.jit. Programs and
    profiles show its name."""
    with jax.named_scope("fa3_attention"):  # an inlined jit leaves no name of its own
        return in_public_layout(functools.partial(attend, options), operands)


def in_public_layout(core: Callable[[Operands], Outputs], operands: Operands) -> Outputs:
    """core(operands) for operands in the user's shapes, with or without a batch dimension; the
    heads are the last dimension of the LSE."""
    outputs = core(in_row_dims(operands))
    if outputs.lse is not None:
        outputs = outputs.replace(lse=jnp.moveaxis(outputs.lse, 1, 2))
    return outputs if operands.is_batched else jax.tree.map(lambda x: x[0], outputs)


def public_results(outputs: Outputs) -> jax.Array | tuple[jax.Array, ...]:
    """out, or a tuple of out and the other requested results."""
    results = tuple(outputs.present().values())
    return results if len(results) > 1 else results[0]
