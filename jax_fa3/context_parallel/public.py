"""Attention over a divided sequence, for use inside jax.shard_map: the public functions.

Each is `dot_product_attention` of the whole sequence, given and returning each device's part.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypedDict, Unpack, cast, overload

import jax
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jax_fa3 import api, sharding
from jax_fa3.arguments import Arguments, Division
from jax_fa3.context_parallel import Divided, Strategy
from jax_fa3.context_parallel.layout import STRIPE, Layout, whole
from jax_fa3.operands import Operands, Outputs
from jax_fa3.options import FLOAT8, MAX_SEQLEN
from jax_fa3.varying import vary_together
from jax_fa3.visibility.table import Visibility
from jax_fa3.vjp import attend

LAYOUTS = ("contiguous", "zigzag", "striped")
INSTEAD = (
    "expected whole sequences with it: call jax_fa3.dot_product_attention under jax.jit, outside "
    "of jax.shard_map, which gathers a sequence that arrives split"
)


class _Options(TypedDict, total=False):
    """The keywords of the three functions that leave the types of their results alone."""

    layout: Layout
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
    logits_soft_cap: float | None
    alibi_slopes: ArrayLike | None
    sinks: ArrayLike | None
    query_segment_ids: ArrayLike | None
    key_value_segment_ids: ArrayLike | None
    kv_start: ArrayLike | None
    kv_end: ArrayLike | None
    attention_chunk: int | None
    visibility: Visibility | None


class _Divided(Protocol):
    """The type of the three functions."""

    @overload
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        *,
        axis_name: str | tuple[str, ...],
        return_residual: Literal[False] = ...,
        return_max_logits: Literal[False] = ...,
        **options: Unpack[_Options],
    ) -> jax.Array: ...

    @overload
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        *,
        axis_name: str | tuple[str, ...],
        return_residual: Literal[True],
        return_max_logits: Literal[False] = ...,
        **options: Unpack[_Options],
    ) -> tuple[jax.Array, jax.Array]: ...

    @overload
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        *,
        axis_name: str | tuple[str, ...],
        return_residual: bool = ...,
        return_max_logits: bool = ...,
        **options: Unpack[_Options],
    ) -> jax.Array | tuple[jax.Array, ...]: ...


def _of_divided(function: Callable[..., Any]) -> _Divided:
    """The function, which says why it lacks what dot_product_attention has."""
    known = inspect.signature(function).parameters
    names = {field.name for field in dataclasses.fields(Arguments)} - known.keys()

    @functools.wraps(function)
    def checked(*arguments: Any, **keywords: Any) -> Any:
        for name in keywords:
            if name in names:
                raise TypeError(f"{function.__name__} takes no {name}; {_instead(name)}")
        return function(*arguments, **keywords)

    return cast(_Divided, checked)


def _instead(name: str) -> str:
    if name == "sequence_parallel":
        return "expected dot_product_attention with it: the function is such a choice"
    if name.endswith("_descale") or name == "value_is_prepared":
        return "expected bfloat16, float16 or float32 inputs: forward_dtype finds scales by itself"
    return INSTEAD


@_of_divided
def ring_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    axis_name: str | tuple[str, ...],
    layout: Layout = "contiguous",
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["fa3", "xla"] | None = None,
    return_residual: bool = False,
    query_offset: ArrayLike | None = None,
    deterministic: bool | None = None,
    sm_margin: int = 0,
    forward_dtype: DTypeLike | None = None,
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
    """Attention over a sequence divided over a mesh axis; keys and values travel around a ring.

    Letters: N devices of the axis; B batch, T query rows, S key rows, H head_dim, all of one
    device, so that the whole sequences have N * T and N * S rows. Devices hold equal parts.

    Args:
      query: (B, T, heads, H) or (T, heads, H); bfloat16, float16 or float32.
      key: (B, S, kv_heads, H) or (S, kv_heads, H), of query's dtype; kv_heads divides heads.
      value: like key; its last dimension may differ from H and is then the output's.
      axis_name: the mesh axis, or axes, over which the sequence is divided; manual here, as it is
        inside `jax.shard_map`.
      layout: which rows a device holds. "contiguous": device r the r-th of N equal parts, as
        PartitionSpec has it. "zigzag": the r-th and the r-th from the end of 2N equal chunks
        (`zigzag_permute`), T and S even. "striped", not for a ring: of stripes of 256 rows the
        stripes r, r + N, r + 2N ... (`striped_permute`), T and S multiples of 256.
      forward_dtype: as in `dot_product_attention`. 16-bit arrays travel, and each device rounds
        its own part to float8.
      query_seq_lengths, key_value_seq_lengths: int32 (B,), of the whole sequences, the same on
        every device. Rows from there on are padding.
      query_offset: as in `dot_product_attention`, of the first row of the whole sequence.
      alibi_slopes, sinks: float32 (heads,), the same on every device; no slopes for
        `allgather_attention` in layout "striped".
      query_segment_ids, key_value_segment_ids: int32 (B, T) and (B, S), as in
        `dot_product_attention`: the device's part of those of the whole sequences.
      kv_start, kv_end: int32 (B, T), (B, heads, T) or (B, kv_heads, T), of the device's rows: key
        positions in the whole sequence.
      attention_chunk: as in `dot_product_attention`.
      visibility: in place of these, the table of the whole sequences, N * T rows and N * S keys in
        natural order, the same on every device.
      Others: scale, is_causal, local_window_size, implementation, return_residual, deterministic,
        sm_margin, logits_soft_cap and return_max_logits, as in `dot_product_attention`.

    Returns:
      out, (B, T, heads, H) or (T, heads, H), of query's dtype; with return_residual also lse,
      float32 (B, T, heads) or (T, heads), and with return_max_logits last max_logits, float32 (B,
      heads) or (heads,), those of the whole sequence on every device. Gradients flow through out
      and lse; those of key, value and sinks are sums over all devices, made in float32.

    Raises:
      ValueError: an argument does not fit, as in `dot_product_attention`; axis_name is not bound;
        layout "zigzag" with an odd number of rows, "striped" with no multiple of 256 or for a ring.
      TypeError: also for a bias or mask, which need whole sequences.
      NotImplementedError: as in `dot_product_attention`.

    Numerics:
      Partial results are rounded to the input dtype by the kernels and merged in float32: the error
      stays within twice that of plain attention in the same dtype.

    Communication:
      Forward, N - 1 permutes of K and V together; backward, those and N - 1 of dK and dV in
      float32. Where a window hides a device's keys from all rows, its step is left out. Causal
      attention over contiguous parts trades halves of queries, keys and values between devices
      first, and halves of the results last, so that all devices have equal work; with an odd number
      of rows a device, it goes without, and takes up to twice as long. Ids and intervals are
      gathered, 4 bytes each, where `visibility` is not given; with any of these no halves are
      traded.

    Example:
      >>> mesh = jax.make_mesh((8,), ("seq",))
      >>> attend = functools.partial(jax_fa3.ring_attention, axis_name="seq", is_causal=True)
      >>> spec = jax.P(None, "seq")
      >>> out = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec))(q, k, v)

    Source: Ring Attention, arXiv:2310.01889; causal balance by pairs of chunks, arXiv:2411.01783.
    """
    return _attend("ring", **locals())


@_of_divided
def allgather_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    axis_name: str | tuple[str, ...],
    layout: Layout = "contiguous",
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["fa3", "xla"] | None = None,
    return_residual: bool = False,
    query_offset: ArrayLike | None = None,
    deterministic: bool | None = None,
    sm_margin: int = 0,
    forward_dtype: DTypeLike | None = None,
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
    """Attention over a sequence divided over a mesh axis; each device gathers all keys and values.

    Args, Returns, Raises: those of `ring_attention`.

    Numerics:
      Without a mask, or under a causal one alone, results for a device's own keys and for the
      others' are each rounded to the input dtype by the kernels and merged in float32; under other
      masks, and with alibi_slopes, the forward pass is that of a single device, row by row. Each
      device's share of the gradients of key and value is rounded to the input dtype; they are added
      in float32.

    Communication:
      Forward, one all-gather of K and V; backward, that and one reduce-scatter of dK and dV in
      float32. Causal attention over contiguous parts trades halves of queries and of results, as in
      `ring_attention`. Other masks than a causal one, and alibi_slopes, have exchanges of their own
      for K and V.

    Source: Llama 3, arXiv:2407.21783, section 3.3.2.
    """
    return _attend("allgather", **locals())


@_of_divided
def ulysses_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    axis_name: str | tuple[str, ...],
    layout: Layout = "contiguous",
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["fa3", "xla"] | None = None,
    return_residual: bool = False,
    query_offset: ArrayLike | None = None,
    deterministic: bool | None = None,
    sm_margin: int = 0,
    forward_dtype: DTypeLike | None = None,
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
    """Attention over a sequence divided over a mesh axis; parts of the sequence trade for heads.

    Args, Returns: those of `ring_attention`.

    Raises:
      ValueError: also where the N devices do not divide query's heads. Key/value heads may be
        fewer than devices, or not a multiple of them: those needed twice are sent twice.

    Numerics:
      Those of a single device, but for shared key/value heads, whose gradients are rounded to the
      input dtype once on each device that has them and then summed in float32.

    Communication:
      For each group of heads, all-to-alls of Q, K and V together, and of out and lse; backward, of
      Q, K, V, out, lse and dout, and of the three gradients. A device's heads are up to four
      groups, as its number of key/value heads allows.

    Source: DeepSpeed Ulysses, arXiv:2309.14509.
    """
    return _attend("ulysses", **locals())


def _attend(
    strategy: Strategy, axis_name: str | tuple[str, ...], layout: Layout, **arguments: Any
) -> jax.Array | tuple[jax.Array, ...]:
    return attention(Arguments(**arguments), strategy, axis_name, layout)


def attention(
    arguments: Arguments,
    strategy: Strategy,
    axis_name: str | tuple[str, ...],
    layout: Layout = "contiguous",
) -> jax.Array | tuple[jax.Array, ...]:
    """The attention of these arguments by one of the strategies."""
    size = _axis_size(f"{strategy}_attention", axis_name)
    if arguments.needs_whole:
        raise ValueError(f"{arguments.needs_whole} is given; {INSTEAD}")
    division = Division(size, lambda x: whole(x, x.ndim - 1, axis_name, layout))
    arguments = api.checked(arguments, division)
    _check_layout(layout, strategy, arguments)
    _check_rows(layout, size, query=arguments.query, key=arguments.key)
    options, operands = api.prepared(arguments, division)
    # A device's part of the work goes through sharding, which divides batch and heads where their
    # axes are automatic here.
    divided = Divided(strategy, axis_name, layout, sharding)

    def core(operands: Operands) -> Outputs:
        # The rank makes the operands vary over the axis even where a caller has copies of them.
        query, _ = vary_together((operands.query, lax.axis_index(axis_name)))
        return attend(options, operands.replace(query=query), divided)

    return api.public_results(api.in_public_layout(core, operands))


def _axis_size(function: str, axis_name: str | tuple[str, ...]) -> int:
    try:
        return lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name is {axis_name!r}; expected a mesh axis that is manual here: call "
            f"{function} inside jax.shard_map over it"
        ) from error


def _check_layout(layout: str, strategy: Strategy, arguments: Arguments) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {LAYOUTS}")
    if layout != "striped":
        return
    if strategy == "ring":
        raise ValueError(
            "layout is 'striped'; expected 'contiguous' or 'zigzag' for a ring, or "
            "allgather_attention or ulysses_attention"
        )
    if strategy == "allgather" and arguments.alibi_slopes is not None:
        raise ValueError(
            "layout is 'striped' and alibi_slopes is given; expected layout 'contiguous' or "
            "'zigzag' with it: slopes need rows that are neighbours"
        )


def _check_rows(layout: str, size: int, **arrays: Any) -> None:
    for name, x in arrays.items():
        if x.dtype.name == FLOAT8:
            raise TypeError(
                f"{name} has dtype {FLOAT8}; expected bfloat16, float16 or float32 (forward_dtype "
                "brings 16-bit inputs to float8)"
            )
        seqlen = x.shape[-3]
        if layout == "zigzag" and seqlen % 2:
            raise ValueError(
                f"{name} has seq = {seqlen} on each device; expected an even number for layout "
                "'zigzag'"
            )
        if layout == "striped" and seqlen % STRIPE:
            raise ValueError(
                f"{name} has seq = {seqlen} on each device; expected a multiple of {STRIPE} for "
                "layout 'striped'"
            )
        if seqlen * size >= MAX_SEQLEN:
            raise ValueError(
                f"{name} has seq = {seqlen} on each of {size} devices; expected less than "
                f"{MAX_SEQLEN} in all"
            )
