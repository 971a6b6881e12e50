"""Attention over a cache, and appends, through XLA: any platform, all of the semantics.

The online softmax over blocks of keys, which are gathered from their pages a block at a time, up
to the longest sequence: neither time nor memory depends on the capacity. Ragged queries become
items, a few rows of one sequence each, and items are what the rest works with.

Letters in einsums: w items, t rows of an item, n keys of a block, k key/value heads, g query heads
of one of them, d head_dim, e head_dim of value.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_fa3.cached import layout
from jax_fa3.cached.problem import (
    Appended,
    AppendOperands,
    AppendOptions,
    Attended,
    CachedOperands,
    CachedOptions,
    Sizes,
    legal_starts,
    owners,
)
from jax_fa3.cached.rotary import rotate
from jax_fa3.options import MAX_SEQLEN

ELEMENTS_PER_BLOCK = 1 << 24  # of gathered keys, or of scores, as far as MIN_BLOCK allows
MIN_BLOCK, MAX_BLOCK = 64, 512  # keys
MAX_ITEM = 64  # rows of a ragged query that go together


def attend(options: CachedOptions, operands: CachedOperands) -> Attended:
    sizes = operands.sizes(options.layout)
    if not (sizes.batch and sizes.tokens):
        return _nothing(options, operands, sizes)
    if operands.query_starts is None:
        every = jnp.arange(sizes.batch, dtype=jnp.int32)
        items = _Items(operands.query, every, jnp.zeros_like(every), operands.query_lengths)
        out, lse = _attend(options, operands, sizes, items)
        return Attended(out, lse)
    items, number, row, is_owned = _items_of_ragged(operands, sizes)
    out, lse = (x[number, row] for x in _attend(options, operands, sizes, items))
    out = jnp.where(is_owned[:, None, None], out, 0)
    return Attended(out, jnp.where(is_owned[:, None], lse, -jnp.inf))


def append(options: AppendOptions, operands: AppendOperands) -> Appended:
    name, tables = options.layout, operands.block_tables
    cache, key, query = operands.key_cache, operands.key, operands.query
    batch, rows = key.shape[:2]
    num_pages, page_size = (layout.extent(cache, name, letter) for letter in "ps")
    row = jnp.arange(rows, dtype=jnp.int32)[None]
    positions = operands.cache_lengths[:, None] + row
    if operands.cos is not None:
        how = operands.cos, operands.sin, positions, options.is_interleaved
        key = rotate(key, *how)
        query = None if query is None else rotate(query, *how)
    if tables is None:
        tables = jnp.arange(batch, dtype=jnp.int32)[:, None]
    is_written = (positions >= 0) & (positions < page_size * tables.shape[1])
    if operands.new_lengths is not None:
        is_written &= row < operands.new_lengths[:, None]
    entry = jnp.clip(positions // page_size, 0, tables.shape[1] - 1)
    page = jnp.take_along_axis(tables, entry, 1, mode="promise_in_bounds")
    page = jnp.where(is_written & (page >= 0), page, num_pages)  # which is to be dropped
    slot = positions % page_size
    if operands.value_cache is None:
        tokens = layout.join_heads(key, operands.value)
        return Appended(layout.put(cache, name, page, slot, tokens), None, query)
    key_cache = layout.put(cache, name, page, slot, key)
    value_cache = layout.put(operands.value_cache, name, page, slot, operands.value)
    return Appended(key_cache, value_cache, query)


class _Items(NamedTuple):
    """Query rows in pieces of one sequence each, all of the same number of rows."""

    query: jax.Array  # [w, t, h, d]
    sequence: jax.Array  # [w]
    first: jax.Array  # [w] its first row's number in the sequence
    lengths: jax.Array | None  # [w] rows from there on are padding


def _items_of_ragged(
    operands: CachedOperands, sizes: Sizes
) -> tuple[_Items, jax.Array, jax.Array, jax.Array]:
    """The items, and for each of the rows its item, its number there, and whether it is in one."""
    starts = legal_starts(operands.query_starts, sizes.tokens)
    counts = jnp.diff(starts)
    size = 1
    while size < min(sizes.tokens // sizes.batch, MAX_ITEM):
        size *= 2
    pieces = -(-counts // size)
    ends = jnp.cumsum(pieces)
    number = jnp.arange((sizes.tokens + sizes.batch * (size - 1)) // size, dtype=jnp.int32)
    sequence = (ends[None] <= number[:, None]).sum(1, dtype=jnp.int32)
    sequence = jnp.minimum(sequence, sizes.batch - 1)
    first = size * (number - (ends - pieces)[sequence])
    token = (starts[sequence] + first)[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    query = operands.query[jnp.clip(token, 0, sizes.tokens - 1)]
    lengths = counts
    if operands.query_lengths is not None:
        lengths = jnp.clip(operands.query_lengths, 0, counts)
    items = _Items(query, sequence, first, lengths[sequence] - first)
    owner, row, is_owned = owners(starts, sizes.tokens)
    item = (ends - pieces)[owner] + row // size
    return items, jnp.where(is_owned, item, 0), jnp.where(is_owned, row % size, 0), is_owned


def _attend(
    options: CachedOptions, operands: CachedOperands, sizes: Sizes, items: _Items
) -> tuple[jax.Array, jax.Array]:
    """out [w, t, h, e] and lse [w, t, h] of the items."""
    w, t, num_heads, d = items.query.shape
    k, group = sizes.num_heads_kv, num_heads // sizes.num_heads_kv
    rows = items.query.reshape(w, t, k, group, d)
    size = _block_size(sizes, w, t)
    ends = jnp.clip(operands.key_lengths, 0, sizes.capacity)[items.sequence]
    keys = _Keys(options.layout, operands, sizes, items.sequence, ends)
    offset = jnp.clip(operands.query_offset, -MAX_SEQLEN, MAX_SEQLEN)[items.sequence]
    row = jnp.arange(t, dtype=jnp.int32)[None]
    position = (offset + items.first)[:, None] + row  # [w, t]
    is_row = None if items.lengths is None else row < items.lengths[:, None]

    def step(i, carry):
        row_max, row_sum, acc = carry
        column = i * size + jnp.arange(size, dtype=jnp.int32)
        is_key = keys.are_there(column)
        key, value = keys.take(column, is_key)
        scores = options.scale * _dot("wtkgd,wnkd->wktgn", rows, key)
        visible = is_key[:, None] & _in_window(options, position[..., None], column)
        visible = visible if is_row is None else visible & is_row[..., None]
        scores = jnp.where(visible[:, None, :, None], scores, -jnp.inf)
        new_max = jnp.maximum(row_max, scores.max(-1))
        safe_max = jnp.where(new_max == -jnp.inf, 0, new_max)
        probs = jnp.exp(scores - safe_max[..., None])
        rescale = jnp.exp(row_max - safe_max)
        weighed = _dot("wktgn,wnke->wktge", probs.astype(value.dtype), value)
        return (
            new_max,
            row_sum * rescale + probs.sum(-1),
            acc * rescale[..., None] + weighed,
        )

    zeros = jnp.zeros_like(rows[..., 0], jnp.float32).transpose(0, 2, 1, 3)  # [w, k, t, g]
    acc = jnp.broadcast_to(zeros[..., None], (*zeros.shape, sizes.head_dim_v))
    blocks = -(-ends.max() // size)
    row_max, row_sum, acc = lax.fori_loop(0, blocks, step, (zeros - jnp.inf, zeros, acc))
    is_empty = row_sum == 0
    row_sum = jnp.where(is_empty, 1, row_sum)
    lse = jnp.where(is_empty, -jnp.inf, jnp.where(is_empty, 0, row_max) + jnp.log(row_sum))
    out = (acc / row_sum[..., None]).astype(_out_dtype(options, operands))
    out = out.transpose(0, 2, 1, 3, 4).reshape(w, t, num_heads, -1)
    return out, lse.transpose(0, 2, 1, 3).reshape(w, t, num_heads)


class _Keys:
    """The keys and values of each item, by their number in its sequence."""

    def __init__(self, name, operands: CachedOperands, sizes: Sizes, sequence, ends):
        self.name, self.sizes, self.ends = name, sizes, ends
        self.caches = operands.key_cache, operands.value_cache
        tables = operands.block_tables
        self.tables = sequence[:, None] if tables is None else tables[sequence]
        starts = operands.key_starts
        self.starts = None if starts is None else starts[sequence]

    def are_there(self, column):
        """[w, n]."""
        column = column[None]
        inside = column < self.ends[:, None]
        return inside if self.starts is None else inside & (column >= self.starts[:, None])

    def take(self, column, is_key):
        """[w, n, k, d] and [w, n, k, e]; zeros for what is no key and for what has no page, since
        a probability of 0 does not stop NaN."""
        entry = jnp.minimum(column // self.sizes.page_size, self.sizes.table_width - 1)
        page = self.tables[:, entry]
        has_page = is_key & (page >= 0) & (page < self.sizes.num_pages)
        page = jnp.where(has_page, page, 0)
        slot = jnp.broadcast_to((column % self.sizes.page_size)[None], page.shape)
        found = [layout.take(x, self.name, page, slot) for x in self.caches if x is not None]
        key, value = found if len(found) == 2 else layout.split_heads(*found)
        return (jnp.where(has_page[..., None, None], x, 0) for x in (key, value))


def _in_window(options: CachedOptions, position, column):
    """[w, t, n], of positions [w, t, 1]; the unbounded side of a window is farther than any."""
    column = column[None, None]
    least, most = position - options.window_left, position + options.window_right
    return (least <= column) & (column <= most)


def _block_size(sizes: Sizes, items: int, rows: int) -> int:
    """Keys of a block. Of the capacity alone it depends, and not on pages, so that all layouts of
    one cache give equal bits."""
    scores = items * rows * sizes.num_heads_q
    elements = items * sizes.num_heads_kv * (sizes.head_dim + sizes.head_dim_v)
    largest = max(ELEMENTS_PER_BLOCK // max(scores, elements), MIN_BLOCK)
    return min(largest, MAX_BLOCK, -(-sizes.capacity // 8) * 8)


def _nothing(options: CachedOptions, operands: CachedOperands, sizes: Sizes) -> Attended:
    """Of a call without rows or without sequences."""
    out = operands.query[..., :1].astype(_out_dtype(options, operands))
    out = jnp.broadcast_to(jnp.zeros_like(out), (*out.shape[:-1], sizes.head_dim_v))
    return Attended(out, jnp.full_like(operands.query[..., 0], -jnp.inf, jnp.float32))


def _out_dtype(options: CachedOptions, operands: CachedOperands):
    return jnp.float32 if options.out_float32 else operands.query.dtype


def _dot(subscripts: str, x, y):
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)
