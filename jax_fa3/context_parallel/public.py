"""Attention over a divided sequence, for use inside jax.shard_map: the public functions.

Each function is `dot_product_attention` of the whole sequence; it takes and returns each device's
part.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, Protocol, Unpack, cast, overload

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
    "of jax.shard_map; the call then gathers a sequence that arrives split"
)


class _Keywords(api.Keywords, total=False):
    """The keywords of the three functions that leave the types of their results alone."""

    layout: Layout


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
        **keywords: Unpack[_Keywords],
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
        **keywords: Unpack[_Keywords],
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
        **keywords: Unpack[_Keywords],
    ) -> jax.Array | tuple[jax.Array, ...]: ...


def _of_divided(function: Callable[..., Any]) -> _Divided:
    """Adds an error with the cure for each argument that only dot_product_attention takes."""
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
        return "expected dot_product_attention with it: this function is one of its values"
    if name.endswith("_descale") or name == "value_is_prepared":
        return "expected bfloat16, float16 or float32 inputs: forward_dtype measures the scales"
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
    """Attention over a sequence divided over a mesh axis; keys and values pass around a ring.

    Letters: N devices along the axis; B batch, T query rows, S keys, H head_dim, all of one device.
    The whole sequences have N * T query rows and N * S keys. All devices hold equal parts.

    Args:
      query: (B, T, heads, H) or (T, heads, H); bfloat16, float16 or float32.
      key: (B, S, kv_heads, H) or (S, kv_heads, H), of query's dtype; kv_heads divides heads.
      value: like key; its last dimension may differ from H, and the output then has the same last
        dimension.
      axis_name: the mesh axis, or axes, over which the sequence is divided; the axis must be
        manual, as inside `jax.shard_map`.
      layout: the rows that a device holds. "contiguous": device r holds the r-th of N equal parts,
        as with PartitionSpec. "zigzag": device r holds the r-th and the r-th from the end of 2N
        equal chunks (`zigzag_permute`); T and S are even. "striped", not for a ring: device r holds
        stripes r, r + N, r + 2N ... of 256 rows (`striped_permute`); T and S are multiples of 256.
      forward_dtype: as in `dot_product_attention`. Devices exchange 16-bit arrays, and each device
        rounds its own part to float8.
      query_seq_lengths, key_value_seq_lengths: int32 (B,), the lengths of the whole sequences, the
        same on every device. Later rows and keys are padding.
      query_offset: as in `dot_product_attention`, for the first row of the whole sequence.
      alibi_slopes, sinks: float32 (heads,), the same on every device; `allgather_attention` takes
        no slopes in layout "striped".
      query_segment_ids, key_value_segment_ids: int32 (B, T) and (B, S), as in
        `dot_product_attention`: the ids of the device's rows and keys.
      kv_start, kv_end: int32 (B, T), (B, heads, T) or (B, kv_heads, T), the intervals of the
        device's rows, as key positions in the whole sequence.
      attention_chunk: as in `dot_product_attention`.
      visibility: in place of ids, intervals and chunks, the table of the whole sequences, N * T
        rows and N * S keys in natural order, the same on every device.
      Others: scale, is_causal, local_window_size, implementation, return_residual, deterministic,
        sm_margin, logits_soft_cap and return_max_logits, as in `dot_product_attention`.

    Returns:
      out, (B, T, heads, H) or (T, heads, H), of query's dtype; with return_residual also lse,
      float32 (B, T, heads) or (T, heads); with return_max_logits also max_logits, last, float32
      (B, heads) or (heads,), the maxima over the whole sequence on every device. Gradients flow
      through out and lse; gradients of key, value and sinks are summed over all devices in float32.

    Raises:
      ValueError: an argument does not fit, as in `dot_product_attention`; axis_name is not bound;
        the rows do not fit the layout; layout "striped" for a ring.
      TypeError: also for a bias or mask, which need whole sequences.
      NotImplementedError: as in `dot_product_attention`.

    Numerics:
      The kernels round partial results to the input dtype, and the partial results are merged in
      float32: the error is at most twice the error of plain attention in the same dtype.

    Communication:
      Forward, N - 1 permutes of K and V together; backward, N - 1 permutes of K and V and N - 1
      permutes of dK and dV in float32. If a window hides a device's keys from all rows, the ring
      skips their step. Causal attention over contiguous parts first exchanges halves of queries,
      keys and values between devices, and last exchanges halves of the results, so that all devices
      have equal work. With an odd number of rows on each device there is no such exchange, and the
      call takes up to twice as long. Without `visibility`, ids and intervals are gathered, 4 bytes
      each. With ids, intervals, chunks or `visibility`, no halves are exchanged.

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

    Args, Returns, Raises: as in `ring_attention`.

    Numerics:
      Without a mask, or with only a causal mask, the kernels round the results for a device's own
      keys and the results for the other devices' keys to the input dtype; both are merged in
      float32. Under other masks, and with alibi_slopes, each row's forward pass is the same as on a
      single device. Each device's share of the gradients of key and value is rounded to the input
      dtype; the shares are summed in float32.

    Communication:
      Forward, one all-gather of K and V; backward, the same and one reduce-scatter of dK and dV in
      float32. Causal attention over contiguous parts exchanges halves of queries and of results, as
      in `ring_attention`. Under masks other than a causal mask, and with alibi_slopes, K and V have
      separate exchanges.

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
    """Attention over a sequence divided over a mesh axis; devices exchange rows for heads.

    Args, Returns: as in `ring_attention`.

    Raises:
      ValueError: also if the number of query heads is not a multiple of the N devices. Key/value
        heads may be fewer than the devices, or not a multiple of them: a head that several devices
        need is sent to each of them.

    Numerics:
      As on a single device, except for key/value heads that several devices share: each device
      rounds its share of their gradients to the input dtype, and the shares are summed in float32.

    Communication:
      For each group of heads, all-to-alls of Q, K and V together, and of out and lse; backward, of
      Q, K, V, out, lse and dout, and of the three gradients. A device's heads form up to four
      groups, depending on its number of key/value heads.

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
    """Attention with these arguments, by the given strategy."""
    size = _axis_size(f"{strategy}_attention", axis_name)
    if arguments.needs_whole:
        raise ValueError(f"{arguments.needs_whole} is given; {INSTEAD}")
    division = Division(size, lambda x: whole(x, x.ndim - 1, axis_name, layout))
    arguments = api.checked(arguments, division)
    _check_layout(layout, strategy, arguments)
    _check_rows(layout, size, query=arguments.query, key=arguments.key)
    options, operands = api.prepared(arguments, division)
    # A device's part of the work goes through sharding, which divides batch and heads over axes
    # that are automatic here.
    divided = Divided(strategy, axis_name, layout, sharding)

    def core(operands: Operands) -> Outputs:
        # The rank makes the operands vary over the axis even if the caller passes replicated ones.
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
            "'zigzag' with it: slopes need adjacent rows"
        )


def _check_rows(layout: str, size: int, **arrays: Any) -> None:
    for name, x in arrays.items():
        if x.dtype.name == FLOAT8:
            raise TypeError(
                f"{name} has dtype {FLOAT8}; expected bfloat16, float16 or float32 (forward_dtype "
                "rounds 16-bit inputs to float8)"
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
                f"{MAX_SEQLEN} in total"
            )
