"""One call over a cache: its static choices, its arrays in the order of the custom calls' operands,
and its sizes.

Dimensions have letters: b sequences, s query rows of each, q the rows of all of them (ragged
queries), h query heads, k key/value heads, d head_dim, e head_dim of value, p pages, x slots of a
page, m entries of a sequence's table.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jax_fa3.cached import layout
from jax_fa3.options import UNBOUNDED, Route


@dataclasses.dataclass(frozen=True)
class CachedOptions:
    """The static choices of one attention call over a cache.

    Row i of a sequence sees key j when key_starts <= j < key_lengths and query_offset + i -
    window_left <= j <= query_offset + i + window_right.
    """

    scale: float  # > 0, multiplies query @ key^T
    window_left: int = UNBOUNDED  # columns, inclusive
    window_right: int = UNBOUNDED
    rescale_threshold: float = 8.0  # log2 units a row maximum may grow before O is rescaled
    sm_margin: int = 0  # streaming multiprocessors that the kernels leave free
    layout: str = "pskh"
    out_float32: bool = False  # else the output has query's dtype
    route: Route = "auto"

    @property
    def has_window(self) -> bool:
        """Whether it matters where a row stands among the keys."""
        return min(self.window_left, self.window_right) < UNBOUNDED


@dataclasses.dataclass(frozen=True)
class AppendOptions:
    """The static choices of one append."""

    layout: str = "pskh"
    is_interleaved: bool = False  # rotary pairs are neighbours; else the halves of the width
    route: Route = "auto"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CachedOperands:
    """The arrays of one attention call. Index arrays are int32, and any value is legal."""

    query: Array  # [b, s, h, d]; with query_starts [q, h, d]
    key_cache: Array  # in the layout; without block_tables page b is sequence b's
    value_cache: Array | None  # absent where key_cache is fused
    key_lengths: Array  # [b] keys that exist; clamped to [0, capacity]
    query_offset: Array  # [b] the position of a sequence's first row
    block_tables: Array | None = None  # [b, m] page numbers
    query_starts: Array | None = None  # [b + 1] sequence b has the rows from [b] to [b + 1]
    query_lengths: Array | None = None  # [b] rows from there on are padding
    key_starts: Array | None = None  # [b] slots before it are not seen

    def present(self) -> dict[str, Array]:
        return _present(self)

    def replace(self, **arrays: Array | None) -> CachedOperands:
        return dataclasses.replace(self, **arrays)

    def sizes(self, name: str) -> Sizes:
        """The sizes of a call whose cache has the layout `name`."""
        query, is_ragged = self.query, self.query_starts is not None
        rows = 0 if is_ragged else query.shape[1]
        cache = self.key_cache
        value = cache if self.value_cache is None else self.value_cache
        is_fused = self.value_cache is None
        return Sizes(
            batch=self.key_lengths.shape[0],
            tokens=query.shape[0] if is_ragged else query.shape[0] * rows,
            rows=rows,
            num_heads_q=query.shape[-2],
            num_heads_kv=layout.extent(cache, name, "k") // (2 if is_fused else 1),
            head_dim=query.shape[-1],
            head_dim_v=layout.extent(value, name, "h"),
            num_pages=layout.extent(cache, name, "p"),
            page_size=layout.extent(cache, name, "s"),
            table_width=1 if self.block_tables is None else self.block_tables.shape[1],
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AppendOperands:
    """The arrays of one append, likewise. Token i of a sequence goes to position cache_lengths + i,
    where i < new_lengths."""

    key_cache: Array
    value_cache: Array | None
    key: Array  # [b, s, k, d]
    value: Array  # [b, s, k, e]
    cache_lengths: Array  # [b] tokens before
    block_tables: Array | None = None  # [b, m]
    new_lengths: Array | None = None  # [b]; all where there are none
    cos: Array | None = None  # float32 [positions, width / 2], both or none
    sin: Array | None = None
    query: Array | None = None  # [b, s, h, d], to be rotated like the keys

    def present(self) -> dict[str, Array]:
        return _present(self)

    def replace(self, **arrays: Array | None) -> AppendOperands:
        return dataclasses.replace(self, **arrays)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Attended:
    """What an attention call gives: out like query with value's head_dim, lse float32 without it,
    in natural log units."""

    out: Array
    lse: Array

    def present(self) -> dict[str, Array]:
        return _present(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Appended:
    """What an append gives: the caches, in the memory of those that it was given, and the rotated
    query where there is one."""

    key_cache: Array
    value_cache: Array | None
    query: Array | None

    def present(self) -> dict[str, Array]:
        return _present(self)


class Sizes(NamedTuple):
    """The sizes of one attention call."""

    batch: int
    tokens: int  # query rows of all sequences
    rows: int  # of each sequence; 0 where queries are ragged
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    num_pages: int
    page_size: int
    table_width: int

    @property
    def capacity(self) -> int:
        """The keys that a sequence may have."""
        return self.page_size * self.table_width


def legal_starts(starts: Array, tokens: int) -> Array:
    """query_starts inside [0, tokens] that do not fall."""
    return jax.lax.cummax(jnp.clip(starts, 0, tokens))


def owners(starts: Array, tokens: int) -> tuple[Array, Array, Array]:
    """For each of the rows of ragged queries its sequence, its number in it, and whether it has a
    sequence; `starts` are legal ones of at least one sequence."""
    token = jnp.arange(tokens, dtype=jnp.int32)
    owner = (starts[None, 1:] <= token[:, None]).sum(1, dtype=jnp.int32)
    is_owned = (owner < starts.size - 1) & (token >= starts[0])
    owner = jnp.minimum(owner, starts.size - 2)
    return owner, token - starts[owner], is_owned


def _present(record) -> dict[str, Array]:
    """The arrays that are there, in the order of their fields."""
    arrays = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {name: x for name, x in arrays.items() if x is not None}
