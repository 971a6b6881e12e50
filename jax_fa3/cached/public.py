"""`cached_attention` and `append_to_cache`: from the user's arrays to options and operands."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_fa3 import native, route, score
from jax_fa3.arguments import dtype_name
from jax_fa3.cached import calls
from jax_fa3.cached.arguments import CachedArguments
from jax_fa3.cached.layout import extent
from jax_fa3.cached.problem import (
    Appended,
    AppendOperands,
    AppendOptions,
    Attended,
    CachedOperands,
    CachedOptions,
    legal_starts,
    owners,
)
from jax_fa3.cached.rotary import Rotary, rotate
from jax_fa3.options import MAX_SEQLEN, UNBOUNDED, Route, resolve_window


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
    """Attention of a few new query rows over the keys and values of a cache, for inference.

    On Hopper GPUs it runs at the speed of memory, whatever the lengths: the work is divided on the
    device. One compiled program serves every length. It has no gradient.

    Letters: B sequences, T new rows of each, N query heads, K key/value heads (a divisor of N), H
    head_dim, P pages of S slots, M pages of a sequence at most. Lengths and positions count tokens.

    Args:
      query: (B, T, N, H), or (tokens, N, H) with query_starts; of the cache's dtype.
      key_cache: bfloat16, float16, or float32 (through XLA). (B, S, K, H), a sequence each; with
        block_tables (P, S, K, H). `layout` has other orders.
      value_cache: likewise, with a head_dim of its own, then the output's; None: layout="fused".
      key, value: (B, T, K, H), or (tokens, K, H): rows that are appended first, in the order of
        query's. Then the caches are returned too; donate them, or XLA copies them.
      cache_lengths: int32 (B,), the tokens of each sequence before the append; all tokens where
        none are appended. Clamped to [0, capacity], which is S, or S * M with block_tables.
      block_tables: int32 (B, M): slot j of a sequence stands in page block_tables[b, j // S]. An
        entry outside [0, P) reads zeros, which take part, and writes nothing; one behind the
        sequence's length is not read.
      query_starts: int32 (B + 1,): sequence b has the query rows from query_starts[b] to
        query_starts[b + 1]. Rows of no sequence are padding.
      new_lengths: int32 (B,), with key: how many of the rows of each sequence are appended (all by
        default); query rows from there on are padding.
      key_starts: int32 (B,): slots before it are not seen. Positions still count from slot 0.
      rotary: turns the query rows, and key before it is written, by their positions.
      scale: a finite Python number that multiplies the scores; default 1 / sqrt(H).
      is_causal: a row sees the keys up to its own position.
      local_window_size: (left, right), or one int for both: how far around its position a row sees,
        both ends included.
      query_offset: int, or int32 of shape () or (B,): the position of a sequence's first row. By
        default that is cache_lengths where rows are appended, and else the last rows of the keys:
        keys minus the sequence's own number of rows.
      layout: the order of p pages (or sequences), s slots, k heads, h head_dim in the caches:
        "pskh", "kpsh", "pksh" or "skph"; "fused": one array (P, S, 2 K, H), heads k0 v0 k1 v1 ...
      return_residual: also return the log-sum-exp of each row's scores, for `combine`.
      out_dtype: None, query's dtype, or float32.
      implementation: None takes the kernels where they apply and logs once, with the reason, where
        they do not; "fa3" raises instead; "xla" forces XLA.
      sm_margin: streaming multiprocessors that the kernels leave free; 0 to 131.

    These index arrays may be int64 where their values fit int32; traced values that do not are
    clamped to it.

    Returns:
      out, or (out, lse) with return_residual; with key the caches follow: (out, [lse,] key_cache,
      value_cache), value_cache None in the fused layout. out is like query with value's head_dim,
      lse float32 (B, T, N) or (tokens, N) in natural log units. A row that sees no key, and every
      padding row, has out 0 and lse -inf.

    Raises:
      ValueError, TypeError: as `dot_product_attention`.
      NotImplementedError: implementation="fa3" and the kernels cannot run the call; or the call is
        differentiated.

    Numerics:
      As `dot_product_attention`. Whatever unused slots and pages hold, NaN included, reaches no
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
    got, caches = _attention(options, append_options, _arrays(arguments))
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
    """Writes rows behind the tokens of a cache, in place where the caches are donated or carried.

    Row i of a sequence goes to position cache_lengths + i, where i < new_lengths. Rows at or past
    the capacity and rows of a page outside [0, P) are dropped. Nothing else of the cache changes.

    Args:
      query: (B, T, N, H), or (tokens, N, H): is returned turned by `rotary`, which it needs.
      Others: those of `cached_attention`.

    Returns:
      (key_cache, value_cache), value_cache None in the fused layout; with query
      (key_cache, value_cache, query).

    Raises:
      ValueError, TypeError, NotImplementedError: as `cached_attention`.

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
    got = _append(AppendOptions(layout, _is_interleaved(rotary), how), _arrays(arguments))
    caches = got.key_cache, got.value_cache
    return caches if got.query is None else (*caches, got.query)


# ---- static choices


def _options(arguments: CachedArguments) -> tuple[CachedOptions, AppendOptions]:
    """Of checked arguments."""
    query = arguments.query
    left, right = resolve_window(arguments.local_window_size, arguments.is_causal)
    is_one_row = not arguments.is_ragged and query.shape[1] == 1
    if is_one_row and arguments.query_offset is None and right >= 0:
        right = UNBOUNDED  # behind the last key there is none
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
    """What runs a call, where `reason` is why no kernel would."""
    if arguments.implementation == "xla":
        return "xla"
    device = route.device_reason()
    if reason or device:
        runs = "its XLA implementation"
        if arguments.implementation == "fa3":
            raise NotImplementedError(
                f"implementation is 'fa3', which cannot run this call: {reason or device}. "
                f"implementation=None runs {runs}."
            )
        route.log_fallback(runs, reason or device, function)
    if reason or (device and route.has_gpu()):
        return "xla"
    return "auto" if arguments.implementation is None else "fa3"


def _append_reason(arguments: CachedArguments) -> str | None:
    """Why no kernel would append to a cache."""
    dtype = dtype_name(arguments.key_cache)
    if dtype not in native.KERNEL_DTYPES:
        return f"the kernels take caches of {' or '.join(native.KERNEL_DTYPES)}, not {dtype}"
    return None if native.has_cache_kernels() else native.NO_CACHE_KERNELS


def _reason(arguments: CachedArguments) -> str | None:
    """Why no kernel would attend to a cache."""
    reason, scale = _append_reason(arguments), arguments.scale
    if reason:
        return reason
    if scale is not None and 0 < abs(scale) < route.MIN_SCALE:
        return (
            f"the kernels take scales of at least {route.MIN_SCALE:g} in magnitude, not {scale:g}"
        )
    # Of this, only what the plan asks for matters; index arrays are not made yet.
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
    """The arrays that a call is given."""
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


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _attention(
    options: CachedOptions, append_options: AppendOptions, arrays: dict[str, jax.Array]
) -> tuple[Attended, Appended | None]:
    """Append where there are keys, then attention; compiled once when called outside of jax.jit."""
    with jax.named_scope("fa3_cached_attention"):
        return _append_and_attend(options, append_options, arrays)


def _append_and_attend(options, append_options, arrays):
    call, arrays = _Call(options.layout, arrays), dict(arrays)
    appends = "key" in arrays
    query, caches = arrays["query"], None
    is_turned = "cos" in arrays
    if appends:
        turns = is_turned and "query_offset" not in arrays  # with the keys: at their positions
        given = arrays if turns else {name: x for name, x in arrays.items() if name != "query"}
        caches = _append(append_options, given)
        query = caches.query if turns else query
        arrays |= dict(key_cache=caches.key_cache, value_cache=caches.value_cache)
        is_turned = is_turned and not turns
    offset, key_lengths = call.query_offset(), call.key_lengths()
    if is_turned:
        how = arrays["cos"], arrays["sin"], call.positions(offset), append_options.is_interleaved
        query = rotate(query, *how)
    operands = CachedOperands(
        query,
        arrays["key_cache"],
        arrays.get("value_cache"),
        key_lengths=key_lengths,
        # Where no row asks for its position, an array that is there already.
        query_offset=offset if options.has_window else key_lengths,
        block_tables=arrays.get("block_tables"),
        query_starts=arrays.get("query_starts"),
        query_lengths=arrays.get("new_lengths"),
        key_starts=arrays.get("key_starts"),
    )
    return calls.attend(options, operands), caches


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _append(options: AppendOptions, arrays: dict[str, jax.Array]) -> Appended:
    with jax.named_scope("fa3_append"):
        call = _Call(options.layout, arrays)
        tables, query = arrays.get("block_tables"), arrays.get("query")
        query = query if "cos" in arrays else None
        operands = AppendOperands(
            arrays["key_cache"],
            arrays.get("value_cache"),
            arrays["key"],
            arrays["value"],
            call.cache_lengths(),
            tables,
            arrays.get("new_lengths"),
            arrays.get("cos"),
            arrays.get("sin"),
            query,
        )
        if "query_starts" not in arrays:
            return calls.append(options, operands)
        got = calls.append(options, call.each_row_by_itself(operands))
        query = None if query is None else got.query[:, 0]
        return Appended(got.key_cache, got.value_cache, query)


class _Call:
    """What follows from the arrays of a call: lengths and positions, int32 and legal."""

    def __init__(self, name: str, arrays: dict[str, jax.Array]):
        self.arrays = arrays
        self.lengths, self.tables = arrays["cache_lengths"], arrays.get("block_tables")
        self.new_lengths = arrays.get("new_lengths")
        slots = extent(arrays["key_cache"], name, "s")
        self.capacity = slots * (1 if self.tables is None else self.tables.shape[1])
        self.starts = None
        if "query_starts" in arrays:
            rows = arrays["query"] if "query" in arrays else arrays["key"]
            self.tokens = rows.shape[0]
            self.starts = legal_starts(arrays["query_starts"], self.tokens)

    def cache_lengths(self) -> jax.Array:
        return jnp.clip(self.lengths, 0, self.capacity)

    def rows(self) -> jax.Array | int:
        """The number of rows of each sequence."""
        if self.starts is not None:
            return jnp.diff(self.starts)
        return (self.arrays["query"] if "query" in self.arrays else self.arrays["key"]).shape[1]

    def key_lengths(self) -> jax.Array:
        """The keys that exist once the new ones are appended."""
        if "key" not in self.arrays:
            return self.lengths  # clamped where they are read
        new = self.rows()
        if self.new_lengths is not None:
            new = jnp.clip(self.new_lengths, 0, new)
        return jnp.minimum(self.cache_lengths() + new, self.capacity)

    def query_offset(self) -> jax.Array:
        if "query_offset" in self.arrays:
            return jnp.clip(self.arrays["query_offset"], -MAX_SEQLEN, MAX_SEQLEN)
        lengths = self.cache_lengths()
        return lengths if "key" in self.arrays else lengths - self.rows()

    def positions(self, offset: jax.Array) -> jax.Array:
        """Of all query rows, with or without sequences of their own."""
        if self.starts is None:
            return offset[:, None] + jnp.arange(self.rows(), dtype=jnp.int32)
        if self.starts.size == 1:
            return jnp.zeros(self.tokens, jnp.int32)
        owner, row, _ = owners(self.starts, self.tokens)
        return offset[owner] + row

    def each_row_by_itself(self, operands: AppendOperands) -> AppendOperands:
        """An append of ragged rows as one of sequences of one row, each with its own's pages."""
        if self.starts.size == 1:  # rows of no sequence
            owner, row, is_owned = (jnp.zeros(self.tokens, jnp.int32),) * 3
            lengths = tables = jnp.zeros((1, 1), jnp.int32)
            lengths = lengths[0]
        else:
            owner, row, is_owned = owners(self.starts, self.tokens)
            if self.new_lengths is not None:
                is_owned &= row < self.new_lengths[owner]
            lengths, tables = operands.cache_lengths, operands.block_tables
            if tables is None:
                tables = jnp.arange(lengths.size, dtype=jnp.int32)[:, None]
        by_row = {name: getattr(operands, name) for name in ("key", "value", "query")}
        by_row = {name: x if x is None else x[:, None] for name, x in by_row.items()}
        return operands.replace(
            cache_lengths=lengths[owner] + row,
            block_tables=tables[owner],
            new_lengths=is_owned.astype(jnp.int32),
            **by_row,
        )
