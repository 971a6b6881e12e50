"""`cached_attention` and `append_to_cache`: from public arrays to options and operands."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_fa3 import native, route, score
from jax_fa3.arguments import dtype_name
from jax_fa3.cached import steps
from jax_fa3.cached.arguments import CachedArguments
from jax_fa3.cached.problem import AppendOptions, CachedOperands, CachedOptions
from jax_fa3.cached.rotary import Rotary
from jax_fa3.options import UNBOUNDED, Route, resolve_window


class _Options(TypedDict, total=False):
    """The keywords of `cached_attention` that do not change the type of its result."""

    block_tables: ArrayLike | None
    query_starts: ArrayLike | None
    new_lengths: ArrayLike | None
    key_starts: ArrayLike | None
    rotary: Rotary | None
    scale: float | None
    is_causal: bool
    local_window_size: int | tuple[int, int] | None
    query_offset: ArrayLike | None
    layout: str
    out_dtype: DTypeLike | None
    implementation: Literal["fa3", "xla"] | None
    sm_margin: int


@overload
def cached_attention(
    query: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike | None,
    key: None = ...,
    value: None = ...,
    *,
    cache_lengths: ArrayLike,
    return_residual: Literal[False] = ...,
    **options: Unpack[_Options],
) -> jax.Array: ...


@overload
def cached_attention(
    query: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike | None,
    key: None = ...,
    value: None = ...,
    *,
    cache_lengths: ArrayLike,
    return_residual: Literal[True],
    **options: Unpack[_Options],
) -> tuple[jax.Array, jax.Array]: ...


@overload
def cached_attention(
    query: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    cache_lengths: ArrayLike,
    return_residual: Literal[False] = ...,
    **options: Unpack[_Options],
) -> tuple[jax.Array, jax.Array, jax.Array]: ...


@overload
def cached_attention(
    query: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    cache_lengths: ArrayLike,
    return_residual: Literal[True],
    **options: Unpack[_Options],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]: ...


@overload
def cached_attention(
    query: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike | None,
    key: ArrayLike | None = ...,
    value: ArrayLike | None = ...,
    *,
    cache_lengths: ArrayLike,
    return_residual: bool = ...,
    **options: Unpack[_Options],
) -> jax.Array | tuple[jax.Array | None, ...]: ...


def cached_attention(
    query: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike | None,
    key: ArrayLike | None = None,
    value: ArrayLike | None = None,
    *,
    cache_lengths: ArrayLike,
    block_tables: ArrayLike | None = None,
    query_starts: ArrayLike | None = None,
    new_lengths: ArrayLike | None = None,
    key_starts: ArrayLike | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    local_window_size: int | tuple[int, int] | None = None,
    query_offset: ArrayLike | None = None,
    layout: str = "pskh",
    return_residual: bool = False,
    out_dtype: DTypeLike | None = None,
    implementation: Literal["fa3", "xla"] | None = None,
    sm_margin: int = 0,
) -> jax.Array | tuple[jax.Array | None, ...]:
    """Attention of new query rows over the keys and values of a cache, for inference.

    On Hopper GPUs, the kernels divide the work on the device, by the lengths in device memory. One
    compiled program serves all lengths. The function has no gradient.

    Letters: B sequences, T new rows of each sequence, N query heads, K key/value heads (a divisor
    of N), H head_dim, P pages of S slots, at most M pages for each sequence. Lengths and positions
    count tokens.

    Args:
      query: (B, T, N, H), or (tokens, N, H) with query_starts; of the cache's dtype.
      key_cache: bfloat16, float16, or float32 (through XLA); (B, S, K, H), one sequence for each
        batch entry, or (P, S, K, H) with block_tables. `layout` gives other orders.
      value_cache: like key_cache; its head_dim may differ from H, and the output then has the same
        head_dim. None with layout="fused".
      key, value: (B, T, K, H), or (tokens, K, H): new rows in the order of query's rows, appended
        first. The result then includes the caches; donate the caches, or XLA copies them.
      cache_lengths: int32 (B,), the number of tokens of each sequence before the append, or of all
        tokens if nothing is appended. Clamped to [0, capacity]; the capacity is S, or S * M with
        block_tables.
      block_tables: int32 (B, M): page block_tables[b, j // S] holds slot j of sequence b. If an
        entry within the length is outside [0, P), rows attend to zeros in its place, and nothing is
        written. Entries past the length are not read.
      query_starts: int32 (B + 1,): sequence b has the query rows from query_starts[b] up to but not
        including query_starts[b + 1]. Rows of no sequence are padding.
      new_lengths: int32 (B,), only with key: the number of rows of each sequence that are appended
        (default: all). Later query rows are padding.
      key_starts: int32 (B,): the first visible slot. Positions still count from slot 0.
      rotary: rotates the query rows, and key before the write, by their positions.
      scale: a finite Python number that multiplies the scores; default 1 / sqrt(H).
      is_causal: a row sees the keys up to its own position.
      local_window_size: (left, right), or one int for both: the number of keys that a row sees on
        each side of its position.
      query_offset: int, or int32 of shape () or (B,): the position of a sequence's first row. The
        default is cache_lengths if rows are appended; otherwise it is the number of keys minus the
        number of rows of the sequence, so that the last row is the last token.
      layout: the order of p pages (or sequences), s slots, k heads, h head_dim in the caches:
        "pskh", "kpsh", "pksh" or "skph"; "fused": one array (P, S, 2 K, H), heads k0 v0 k1 v1 ...
      return_residual: also return the log-sum-exp of each row's scores, for `combine`.
      out_dtype: None, query's dtype, or float32.
      implementation: None runs the kernels if they support the call, and otherwise runs XLA and
        logs the reason once; "fa3" raises instead; "xla" forces XLA.
      sm_margin: the number of streaming multiprocessors, 0 to 131, that the kernels leave free.

    The index arrays may be int64 if their values fit int32; traced values that do not fit are
    clamped to int32.

    Returns:
      out, or (out, lse) with return_residual. With key, the caches follow: (out, [lse,] key_cache,
      value_cache), with value_cache None in the fused layout. out has query's shape with value's
      head_dim; lse is float32 (B, T, N) or (tokens, N) in natural log units. A row that sees no
      key, and every padding row, has out 0 and lse -inf.

    Raises:
      ValueError, TypeError: as in `dot_product_attention`.
      NotImplementedError: implementation="fa3" and the kernels cannot run the call; or the call is
        differentiated.

    Numerics:
      As in `dot_product_attention`. Values in unused slots and pages, including NaN, reach no
      result.

    Example:
      >>> cache = jnp.zeros((64, 16, 2, 128), jnp.bfloat16)  # 64 pages of 16 slots
      >>> tables = jnp.arange(8).reshape(2, 4)
      >>> q, k = jnp.ones((2, 1, 8, 128), jnp.bfloat16), jnp.ones((2, 1, 2, 128), jnp.bfloat16)
      >>> lengths = jnp.array([17, 3])
      >>> out, keys, values = jax_fa3.cached_attention(
      ...     q, cache, cache, k, k, cache_lengths=lengths, block_tables=tables)
      >>> out.shape
      (2, 1, 8, 128)
    """
    arguments = CachedArguments(**locals()).checked("query")
    options, append_options = _options(arguments)
    with_keys = arguments.key is not None
    got, caches = steps.attention(options, append_options, _arrays(arguments))
    results = (got.out, got.lse) if arguments.return_residual else (got.out,)
    if with_keys:
        results += caches.key_cache, caches.value_cache
    return results if len(results) > 1 else got.out


def append_to_cache(
    key_cache: ArrayLike,
    value_cache: ArrayLike | None,
    key: ArrayLike,
    value: ArrayLike,
    *,
    cache_lengths: ArrayLike,
    block_tables: ArrayLike | None = None,
    query_starts: ArrayLike | None = None,
    new_lengths: ArrayLike | None = None,
    rotary: Rotary | None = None,
    query: ArrayLike | None = None,
    layout: str = "pskh",
    implementation: Literal["fa3", "xla"] | None = None,
) -> tuple[jax.Array | None, ...]:
    """Appends rows to a cache, in place if the caches are donated or carried.

    Row i of a sequence is written to position cache_lengths + i if i < new_lengths. Rows at or past
    the capacity, and rows of a page outside [0, P), are not written. The rest of the cache does not
    change.

    Args:
      query: (B, T, N, H), or (tokens, N, H): rotated by `rotary` and returned; needs `rotary`.
      Others: as in `cached_attention`.

    Returns:
      (key_cache, value_cache), with value_cache None in the fused layout; with query
      (key_cache, value_cache, query).

    Raises:
      ValueError, TypeError, NotImplementedError: as in `cached_attention`.

    Example:
      >>> cache = jnp.zeros((2, 64, 2, 128), jnp.bfloat16)  # two sequences of up to 64 tokens
      >>> key = jnp.ones((2, 3, 2, 128), jnp.bfloat16)
      >>> keys, values = jax_fa3.append_to_cache(
      ...     cache, cache, key, key, cache_lengths=jnp.array([0, 62]))
    """
    arguments = CachedArguments(**locals()).checked("key")
    if arguments.query is not None and rotary is None:
        raise ValueError("query is given and rotary is None; expected both, or no query")
    how = _route("append_to_cache", arguments, _append_reason(arguments))
    got = steps.append(AppendOptions(layout, _is_interleaved(rotary), how), _arrays(arguments))
    caches = got.key_cache, got.value_cache
    return caches if got.query is None else (*caches, got.query)


# ---- static options


def _options(arguments: CachedArguments) -> tuple[CachedOptions, AppendOptions]:
    """The static options of checked arguments."""
    query = arguments.query
    left, right = resolve_window(arguments.local_window_size, arguments.is_causal)
    is_one_row = not arguments.is_ragged and query.shape[1] == 1
    if is_one_row and arguments.query_offset is None and right >= 0:
        right = UNBOUNDED  # the row is at the last key
    how = _route("cached_attention", arguments, _reason(arguments))
    out_dtype = None if arguments.out_dtype is None else jnp.dtype(arguments.out_dtype).name
    options = CachedOptions(
        scale=abs(score.resolve_scale(arguments.scale, query.shape[-1])) or 1.0,
        window_left=left,
        window_right=right,
        sm_margin=int(arguments.sm_margin),
        layout=arguments.layout,
        out_float32=out_dtype == "float32",
        route=how,
    )
    interleaved = _is_interleaved(arguments.rotary)
    return options, AppendOptions(arguments.layout, interleaved, how)


def _is_interleaved(rotary: Rotary | None) -> bool:
    return rotary is not None and bool(rotary.interleaved)


def _route(function: str, arguments: CachedArguments, reason: str | None) -> Route:
    """The route of a call; `reason` says why no kernel would run it, if any."""
    if arguments.implementation == "xla":
        route.tell(arguments, route.FORCED)
        return "xla"
    reasons = route.Reasons(reason, None, None, route.device_reason())
    route.tell(arguments, reasons)
    if reasons.first:
        if arguments.implementation == "fa3":
            raise NotImplementedError(
                f"implementation is 'fa3', which cannot run this call: {reasons.first}. "
                f"implementation=None runs {reasons.runs}."
            )
        route.log_fallback(reasons.runs, reasons.first, function)
    if reason or (reasons.device and route.has_gpu()):
        return "xla"
    return "auto" if arguments.implementation is None else "fa3"


def _append_reason(arguments: CachedArguments) -> str | None:
    """Why no kernel would append to a cache."""
    dtype = dtype_name(arguments.key_cache)
    if dtype not in native.KERNEL_DTYPES:
        return f"the kernels take caches of {' or '.join(native.KERNEL_DTYPES)}, not {dtype}"
    return native.IMPORT_ERROR


def _reason(arguments: CachedArguments) -> str | None:
    """Why no kernel would attend to a cache."""
    reason, scale = _append_reason(arguments), arguments.scale
    if reason:
        return reason
    if scale is not None and 0 < abs(scale) < route.MIN_SCALE:
        return (
            f"the kernels take scales of at least {route.MIN_SCALE:g} in magnitude, not {scale:g}"
        )
    # The plan only reads the sizes; index arrays are not made yet.
    sizes = CachedOperands(
        arguments.query,
        arguments.key_cache,
        arguments.value_cache,
        key_lengths=arguments.cache_lengths,
        query_offset=arguments.cache_lengths,
        block_tables=arguments.block_tables,
        query_starts=arguments.query_starts,
    ).sizes(arguments.layout)
    try:
        is_paged = arguments.block_tables is not None
        native.plan_forward_cached(dtype_name(arguments.query), sizes, is_paged)
    except ValueError as error:
        return str(error)
    return None


# ---- arrays


def _arrays(arguments: CachedArguments) -> dict[str, jax.Array]:
    """The arrays of a call, by name."""
    names = (
        "query key_cache value_cache key value cache_lengths block_tables query_starts new_lengths "
        "key_starts query_offset"
    )
    found = {name: getattr(arguments, name) for name in names.split()}
    found = {name: jnp.asarray(x) for name, x in found.items() if x is not None}
    if "query" in found and arguments.scale is not None:
        scale = score.resolve_scale(arguments.scale, found["query"].shape[-1])
        found["query"] = score.carry_sign(found["query"], scale)
    if arguments.rotary is not None:
        tables = arguments.rotary_tables()
        found["cos"], found["sin"] = (jnp.asarray(x, jnp.float32) for x in tables)
    if "query_offset" in found:
        shape = found["cache_lengths"].shape
        found["query_offset"] = jnp.broadcast_to(found["query_offset"].astype(jnp.int32), shape)
    return found
