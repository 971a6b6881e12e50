"""What a call does, step by step: append, turn the queries, attend; and what its arrays say of it,
lengths and positions.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jax_fa3.cached import calls
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
from jax_fa3.cached.rotary import rotate
from jax_fa3.options import MAX_SEQLEN


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def attention(
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
        caches = append(append_options, given)
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
def append(options: AppendOptions, arrays: dict[str, jax.Array]) -> Appended:
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
            return offset[:, None] + jnp.arange(self.rows(), dtype=jnp.int32)[None]
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
