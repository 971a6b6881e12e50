"""The arguments of a call over a cache as one record, and their checks.

As in validate.py, each error names the argument, the value it got and the expected value.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from jax_fa3.arguments import as_array, as_indices, dtype_name
from jax_fa3.cached.layout import FUSED, LAYOUTS, extent
from jax_fa3.cached.rotary import Rotary
from jax_fa3.operands import DTYPES
from jax_fa3.options import MAX_SEQLEN
from jax_fa3.validate import check_dtype
from jax_fa3.values import (
    argument,
    check_choice,
    check_flag,
    check_implementation,
    check_offset,
    check_out_dtype,
    check_scale,
    check_sm_margin,
    check_values,
    check_window,
    is_array,
    shape_of,
)

ARRAYS = ("query", "key_cache", "value_cache", "key", "value")
INDICES = (
    "cache_lengths",
    "block_tables",
    "query_starts",
    "new_lengths",
    "key_starts",
    "query_offset",
)
ROTARY_WIDTH = 16  # a multiple of it


@dataclasses.dataclass(frozen=True, eq=False)
class CachedArguments:
    """The arguments of `cached_attention`; `append_to_cache` has some of them."""

    query: Any
    key_cache: Any
    value_cache: Any
    key: Any = None
    value: Any = None
    cache_lengths: Any = None
    block_tables: Any = None
    query_starts: Any = None
    new_lengths: Any = None
    key_starts: Any = None
    rotary: Any = None
    scale: Any = argument(check_scale)
    is_causal: Any = argument(check_flag, True)
    local_window_size: Any = argument(check_window)
    query_offset: Any = argument(check_offset)
    layout: Any = argument(partial(check_choice, LAYOUTS), "pskh")
    return_residual: Any = argument(check_flag, False)
    out_dtype: Any = None
    implementation: Any = argument(check_implementation)
    sm_margin: Any = argument(check_sm_margin, 0)

    def checked(self, needed: str) -> CachedArguments:
        """The arguments, with array-like values as arrays; raises unless all are valid and the
        argument `needed` is given."""
        if getattr(self, needed) is None:
            raise TypeError(f"{needed} is None; expected an array")
        made = {name: getattr(self, name) for name in ARRAYS}
        made = {name: x if x is None else _as_array(name, x) for name, x in made.items()}
        for name in INDICES:
            x = getattr(self, name)
            is_number = name == "query_offset" and not is_array(x)
            made[name] = x if x is None or is_number else as_indices(name, x)
        arguments = dataclasses.replace(self, **made)
        arguments._check()
        return arguments

    @property
    def is_fused(self) -> bool:
        return self.layout == FUSED

    @property
    def is_ragged(self) -> bool:
        return self.query_starts is not None

    @property
    def batch(self) -> int:
        """The number of sequences."""
        if self.is_ragged:
            return self.query_starts.shape[0] - 1
        return (self.key if self.query is None else self.query).shape[0]

    @property
    def capacity(self) -> int:
        """The largest number of keys of a sequence."""
        width = 1 if self.block_tables is None else self.block_tables.shape[1]
        return width * extent(self.key_cache, self.layout, "s")

    @property
    def num_heads_kv(self) -> int:
        return extent(self.key_cache, self.layout, "k") // (2 if self.is_fused else 1)

    @property
    def head_dim_v(self) -> int:
        value = self.key_cache if self.is_fused else self.value_cache
        return extent(value, self.layout, "h")

    def _check(self) -> None:
        check_values(self)
        self._check_caches()
        if self.query is not None:
            self._check_query()
        self._check_new()
        self._check_indices()
        if self.rotary is not None:
            self._check_rotary()
        if self.query is not None:
            self._check_out_dtype()

    def _check_caches(self) -> None:
        given = dict(key_cache=self.key_cache)
        if self.is_fused:
            if self.value_cache is not None:
                raise ValueError(
                    "value_cache is given and layout is 'fused'; expected None: key_cache holds "
                    "the values"
                )
        else:
            given["value_cache"] = self.value_cache
        for name, x in given.items():
            if x is None:
                fused = " (None only with layout='fused')" if name == "value_cache" else ""
                raise TypeError(f"{name} is None; expected an array{fused}")
            letters = ", ".join(_WORDS[letter] for letter in self._order)
            if x.ndim != 4:
                raise ValueError(
                    f"{name} has {x.ndim} dimensions, shape {shape_of(x)}; expected ({letters})"
                )
            check_dtype(name, x, DTYPES)
            if x.dtype != self.key_cache.dtype:
                raise TypeError(
                    f"{name} has dtype {x.dtype}; expected {self.key_cache.dtype} like key_cache"
                )
            for letter in "pskh":
                n, of_key = (extent(y, self.layout, letter) for y in (x, self.key_cache))
                may_be_empty = letter == "p" and self.block_tables is None
                if n == 0 and not may_be_empty:
                    raise ValueError(
                        f"{name} has {_WORDS[letter]} = 0, shape {shape_of(x)}; expected at least 1"
                    )
                if letter != "h" and n != of_key:
                    raise ValueError(
                        f"{name} has {_WORDS[letter]} = {n}, shape {shape_of(x)}; expected "
                        f"{of_key} like key_cache, shape {shape_of(self.key_cache)}"
                    )
        heads = extent(self.key_cache, self.layout, "k")
        if self.is_fused and heads % 2:
            raise ValueError(
                f"key_cache has heads = {heads}, shape {shape_of(self.key_cache)}; expected an "
                "even number with layout='fused': key and value heads alternate"
            )

    @property
    def _order(self) -> str:
        return "pskh" if self.is_fused else self.layout

    def _check_query(self) -> None:
        query, ndim = self.query, 3 if self.is_ragged else 4
        want = "(batch, rows, heads, head_dim)"
        if self.is_ragged:
            want = "(tokens, heads, head_dim) with query_starts"
        if query.ndim != ndim:
            raise ValueError(
                f"query has {query.ndim} dimensions, shape {shape_of(query)}; expected {want}"
            )
        self._check_like_cache("query", query)
        head_dim = extent(self.key_cache, self.layout, "h")
        if query.shape[-1] != head_dim:
            raise ValueError(
                f"query has head_dim = {query.shape[-1]}, shape {shape_of(query)}; expected "
                f"{head_dim} like key_cache, shape {shape_of(self.key_cache)}"
            )
        heads, num_heads_kv = query.shape[-2], self.num_heads_kv
        if heads == 0 or heads % num_heads_kv:
            raise ValueError(
                f"query has {heads} heads; expected a multiple of the cache's {num_heads_kv} "
                "key/value heads"
            )
        rows = query.shape[0] if self.is_ragged else query.shape[1]
        if rows >= MAX_SEQLEN:
            raise ValueError(f"query has {rows} rows; expected less than {MAX_SEQLEN}")

    def _check_new(self) -> None:
        key, value = self.key, self.value
        if (key is None) != (value is None):
            there, missing = ("key", "value") if value is None else ("value", "key")
            raise ValueError(f"{missing} is None and {there} is given; expected both or none")
        if key is None:
            return
        leading = self.query.shape[:-2] if self.query is not None else key.shape[:-2]
        heads, head_dim = self.num_heads_kv, extent(self.key_cache, self.layout, "h")
        for name, x, dim in (("key", key, head_dim), ("value", value, self.head_dim_v)):
            want = (*leading, heads, dim)
            if x.ndim != (3 if self.is_ragged else 4) or tuple(x.shape) != want:
                if self.query is None and name == "key":
                    rows = "tokens" if self.is_ragged else "batch, rows"
                    want = f"({rows}, {heads}, {dim})"
                raise ValueError(f"{name} has shape {shape_of(x)}; expected {want}")
            self._check_like_cache(name, x)

    def _check_like_cache(self, name: str, x: Any) -> None:
        if x.dtype != self.key_cache.dtype:
            raise TypeError(
                f"{name} has dtype {x.dtype}; expected {self.key_cache.dtype} like key_cache"
            )

    def _check_indices(self) -> None:
        if self.cache_lengths is None:
            raise TypeError("cache_lengths is None; expected an array")
        if self.new_lengths is not None and self.key is None:
            raise ValueError("new_lengths is given and key is None; expected both or none")
        if self.is_ragged and (self.query_starts.ndim != 1 or not self.query_starts.size):
            raise ValueError(
                f"query_starts has shape {shape_of(self.query_starts)}; expected (batch + 1,)"
            )
        batch = self.batch
        shapes = dict.fromkeys(INDICES, (batch,))
        shapes["query_starts"] = (batch + 1,)
        tables = self.block_tables
        if tables is not None and tables.ndim != 2:
            raise ValueError(
                f"block_tables has shape {shape_of(tables)}; expected (batch, pages of a sequence)"
            )
        shapes["block_tables"] = (batch, max(1, 1 if tables is None else tables.shape[1]))
        for name in INDICES:
            x = getattr(self, name)
            if x is None or not is_array(x):
                continue
            check_dtype(name, x, ("int32",))
            if name == "query_offset" and x.shape == ():
                continue
            if tuple(x.shape) != shapes[name]:
                one = ", one per sequence" if len(shapes[name]) == 1 else ""
                raise ValueError(f"{name} has shape {shape_of(x)}; expected {shapes[name]}{one}")
        pages = extent(self.key_cache, self.layout, "p")
        if tables is None and pages != batch:
            raise ValueError(
                f"key_cache has {pages} sequences, shape {shape_of(self.key_cache)}; expected "
                f"{batch} like {'query_starts' if self.is_ragged else 'query'}, or block_tables"
            )
        if self.capacity >= MAX_SEQLEN:
            raise ValueError(
                f"key_cache has room for {self.capacity} keys of a sequence; expected less than "
                f"{MAX_SEQLEN}"
            )

    def _check_rotary(self) -> None:
        rotary = self.rotary
        if not isinstance(rotary, Rotary):
            raise TypeError(
                f"rotary is a {type(rotary).__name__}; expected jax_fa3.Rotary(cos, sin)"
            )
        check_flag("rotary.interleaved", rotary.interleaved)
        cos, sin = self.rotary_tables()
        for name, x in (("cos", cos), ("sin", sin)):
            check_dtype(f"rotary.{name}", x, (*DTYPES, "float64"))
            if x.ndim != 2 or not x.size or x.shape != cos.shape:
                raise ValueError(
                    f"rotary.{name} has shape {shape_of(x)}; expected (positions, width / 2), the "
                    "same for cos and sin"
                )
        width, head_dim = 2 * cos.shape[1], extent(self.key_cache, self.layout, "h")
        if width % ROTARY_WIDTH or width > head_dim:
            raise ValueError(
                f"rotary.cos has shape {shape_of(cos)}, for a width of {width}; expected a width "
                f"that is a multiple of {ROTARY_WIDTH}, at most head_dim = {head_dim}"
            )

    def rotary_tables(self) -> tuple[Any, Any]:
        """cos and sin as arrays."""
        given = dict(cos=self.rotary.cos, sin=self.rotary.sin)
        cos, sin = (_as_array(f"rotary.{name}", x) for name, x in given.items())
        return cos, sin

    def _check_out_dtype(self) -> None:
        allowed = tuple(dict.fromkeys((dtype_name(self.query), "float32")))
        check_out_dtype("out_dtype", self.out_dtype, allowed)


_WORDS = {"p": "pages", "s": "slots", "k": "heads", "h": "head_dim"}


def _as_array(name: str, x: Any) -> jax.Array | np.ndarray:
    has_shape = hasattr(x, "shape") and hasattr(x, "dtype") and hasattr(x, "ndim")
    return x if has_shape else as_array(name, x)
