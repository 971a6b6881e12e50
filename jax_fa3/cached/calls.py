"""The two operations of caches as a program meets them: mapped by jax.vmap, divided over a mesh,
and never differentiated.

A mapped axis is folded into the sequences. Caches that are mapped become one cache of all their
pages, whose tables are shifted; one that is not mapped is shared.

Over a mesh, batch and heads are split. Query heads are split only as far as key/value heads: a
device could take the key heads it needs, but that copies its cache. The pages and slots of a cache
stay whole, as the numbers in a table are those of all pages.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from jax_fa3.cached import layout, operations
from jax_fa3.cached.problem import (
    Appended,
    AppendOperands,
    AppendOptions,
    Attended,
    CachedOperands,
    CachedOptions,
)
from jax_fa3.operations import undifferentiable
from jax_fa3.options import AttentionOptions
from jax_fa3.sharding.carry import distribute
from jax_fa3.sharding.operation import Operation
from jax_fa3.varying import vary_together

NO_GRADIENT = "attention over a cache has no gradient; train with dot_product_attention"
KERNEL_SLOTS = 8  # the kernels' page sizes are multiples of it
WHOLE = {"p": "pages", "x": "slots", "r": "sequences"}
REFUSAL = (
    "a cache arrives with its {what} split over mesh axis {{axes}}; expected whole {what} here: "
    "split key/value heads instead, or use jax.shard_map with each device's own cache and page "
    "numbers"
)


def attend(options: CachedOptions, operands: CachedOperands) -> Attended:
    @custom_vmap
    def call(operands):
        return _divided_attend(options, operands)

    @call.def_vmap
    def fold(size, mapped, operands):
        (mapped,) = mapped
        if operands.query_starts is not None:
            results = _one_by_one(functools.partial(attend, options), mapped, operands)
        else:
            folded = _fold_attend(options.layout, size, mapped, operands)
            results = _unfold(size, attend(options, folded))
        return results, jax.tree.map(lambda _: True, results)

    return undifferentiable(call, NO_GRADIENT, "cached_attention")(vary_together(operands))


def append(options: AppendOptions, operands: AppendOperands) -> Appended:
    @custom_vmap
    def call(operands):
        return _divided_append(options, operands)

    @call.def_vmap
    def fold(size, mapped, operands):
        (mapped,) = mapped
        folded = _fold_append(options.layout, size, mapped, operands)
        got = append(options, folded)
        unfold = functools.partial(_unfold_pages, options.layout, size)
        query = None if got.query is None else _unfold(size, got.query)
        results = Appended(unfold(got.key_cache), unfold(got.value_cache), query)
        return results, jax.tree.map(lambda _: True, results)

    return undifferentiable(call, NO_GRADIENT, "append_to_cache")(vary_together(operands))


# ---- jax.vmap


def _fold_attend(name, size, mapped, operands) -> CachedOperands:
    """One problem of `size` times the sequences."""
    lengths = operands.key_lengths
    batch = lengths.shape[1 if mapped.key_lengths else 0]
    is_mapped = mapped.key_cache or bool(mapped.value_cache)
    if operands.block_tables is None and not is_mapped:
        slots = layout.extent(operands.key_cache, name, "s")
        if slots % KERNEL_SLOTS:
            is_mapped = True  # repeated: as pages the kernels would not take it
        else:
            every = jnp.arange(batch, dtype=jnp.int32)[:, None]
            operands = operands.replace(block_tables=every)
            mapped = mapped.replace(block_tables=False)
    return _folded(name, size, mapped, operands, is_mapped)


def _fold_append(name, size, mapped, operands) -> AppendOperands:
    arrays = operands.present()
    for cache in ("key_cache", "value_cache"):
        if cache in arrays and not getattr(mapped, cache):
            raise ValueError(
                f"{cache} is not mapped by jax.vmap, but the appended rows are; expected a mapped "
                "cache: calls that share a cache would write to the same slots"
            )
    if mapped.cos or mapped.sin:
        raise ValueError("rotary is mapped by jax.vmap; expected one pair of tables for all calls")
    return _folded(name, size, mapped, operands, True)


def _folded(name, size, mapped, operands, is_cache_mapped):
    """The operands with [size * b, ...] in place of [b, ...], and caches with size * p pages."""
    arrays, found = operands.present(), {}
    for field, x in arrays.items():
        own = bool(getattr(mapped, field))
        if field in ("cos", "sin"):
            found[field] = x
        elif field in ("key_cache", "value_cache"):
            found[field] = _fold_pages(name, size, x, own) if is_cache_mapped else x
        else:
            x = x if own else jnp.broadcast_to(x[None], (size, *x.shape))
            if field == "block_tables" and is_cache_mapped:
                pages = layout.extent(arrays["key_cache"][0], name, "p")
                x = _shifted(x, pages)
            found[field] = x.reshape(-1, *x.shape[2:])
    return operands.replace(**found)


def _shifted(tables: jax.Array, pages: int) -> jax.Array:
    """Tables [v, b, m] of each mapped cache for the folded one; what is no page stays none."""
    first = pages * jnp.arange(len(tables), dtype=jnp.int32)[:, None, None]
    return jnp.where((tables >= 0) & (tables < pages), tables + first, -1)


def _fold_pages(name: str, size: int, x: jax.Array, is_mapped: bool) -> jax.Array:
    x = x if is_mapped else jnp.broadcast_to(x[None], (size, *x.shape))
    axis = layout.order(name).index("p")
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _unfold_pages(name: str, size: int, x: jax.Array | None) -> jax.Array | None:
    if x is None:
        return None
    axis = layout.order(name).index("p")
    return jnp.moveaxis(x.reshape(*x.shape[:axis], size, -1, *x.shape[axis + 1 :]), axis, 0)


def _unfold(size: int, results: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)


def _one_by_one(call: Callable, mapped: Any, operands: Any) -> Any:
    """Mapped calls one after another, as ragged queries of several calls make no ragged queries."""
    arrays = operands.present()
    own = {name: x for name, x in arrays.items() if getattr(mapped, name)}
    return lax.map(lambda own: call(operands.replace(**own)), own)


# ---- meshes


def _divided_attend(options: CachedOptions, operands: CachedOperands) -> Attended:
    is_paged, is_ragged = operands.block_tables is not None, operands.query_starts is not None
    own = "r" if is_ragged else "b"  # sequences are not split where rows of all stand together
    rows = "q" if is_ragged else "bs"
    dims = dict(
        query=rows + "hd",
        **_cache_dims(options.layout, "p" if is_paged else own, operands),
        key_lengths=own,
        query_offset=own,
        block_tables=own + "m",
        query_starts="u",
        query_lengths=own,
        key_starts=own,
    )
    results = Attended(rows + "he", rows + "h")
    return _divided(functools.partial(operations.attend, options), options, dims, operands, results)


def _divided_append(options: AppendOptions, operands: AppendOperands) -> Appended:
    # Where caches are paged, each device of a split batch would write to pages of its own copy.
    own = "b" if operands.block_tables is None else "r"
    caches = _cache_dims(options.layout, "p" if own == "r" else own, operands)
    dims = dict(
        **caches,
        key=own + "skd",
        value=own + "ske",
        cache_lengths=own,
        block_tables=own + "m",
        new_lengths=own,
        cos="yz",
        sin="yz",
        query=own + "shd",
    )
    query = None if operands.query is None else dims["query"]
    results = Appended(caches["key_cache"], caches.get("value_cache"), query)
    return _divided(functools.partial(operations.append, options), options, dims, operands, results)


def _cache_dims(name: str, page: str, operands: Any) -> dict[str, str]:
    """With fused heads as [k, 2], since mesh axes divide pairs of them."""
    if operands.value_cache is None:
        return dict(key_cache=page + "xkjd")
    letters = layout.order(name).translate(str.maketrans({"p": page, "s": "x"}))
    return dict(key_cache=letters.replace("h", "d"), value_cache=letters.replace("h", "e"))


def _divided(call: Callable, options: Any, dims: dict[str, str], operands: Any, results: Any):
    """call(operands), each device with its part; `dims`: the arrays' dimensions by name."""
    is_fused = operands.value_cache is None
    arrays = operands.replace(key_cache=_paired(operands.key_cache)) if is_fused else operands
    names = list(arrays.present())
    leaves, tree = jax.tree.flatten(arrays)
    returned, results_tree = jax.tree.flatten(results)

    def local(sequence, *leaves):
        operands = tree.unflatten(leaves)
        if not is_fused:
            return tuple(jax.tree.leaves(call(operands)))
        got = call(operands.replace(key_cache=_unpaired(operands.key_cache)))
        if isinstance(got, Appended):
            got = dataclasses.replace(got, key_cache=_paired(got.key_cache))
        return tuple(jax.tree.leaves(got))

    operation = Operation(
        AttentionOptions(scale=1.0),
        local,
        tuple(dims[name] for name in names),
        tuple(returned),
        needs_whole=None,
        heads_meet=False,
        heads_alike=True,
        whole={
            letter: REFUSAL.format(what=what)
            for letter, what in WHOLE.items()
            if letter in dims["key_cache"]
        },
    )
    got = results_tree.unflatten(distribute(operation, leaves))
    if is_fused and isinstance(got, Appended):
        got = dataclasses.replace(got, key_cache=_unpaired(got.key_cache))
    return got


def _paired(fused: jax.Array) -> jax.Array:
    return fused.reshape(*fused.shape[:2], -1, 2, fused.shape[3])


def _unpaired(paired: jax.Array) -> jax.Array:
    return paired.reshape(*paired.shape[:2], -1, paired.shape[4])
