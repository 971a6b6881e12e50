"""Caches on meshes: contiguous ones split over batch and heads, pages split over heads, local pages
inside shard_map; without collectives, and on no device more of a cache than its part."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cached
from cached import CachedCase, Problem
from collectives import collectives
from jax_fa3 import append_to_cache, cached_attention
from meshes import both_kinds, compiled_for, mesh_of

BASE = CachedCase(lengths=(13, 0, 41, 46), rows=2, appends=True, heads_q=8, heads_kv=4, head_dim=16)
CONTIGUOUS = dataclasses.replace(BASE, page_size=None)


def run_on(mesh, problem, places):
    """Compiled and run with arrays split by `places`, their names' specs; (compiled, results)."""
    arrays, options = problem.arguments()
    names = ["query", "key_cache", "value_cache", "key", "value"][: len(arrays)]
    index = {name: x for name, x in options.items() if isinstance(x, np.ndarray)}
    static = {name: x for name, x in options.items() if name not in index}
    given = {name: x for name, x in dict(zip(names, arrays, strict=True), **index).items()}
    none = {name: None for name, x in given.items() if x is None}
    given = {name: x for name, x in given.items() if x is not None}

    def run(given):
        return cached_attention(**given, **none, **static)

    with jax.set_mesh(mesh):
        x = {
            name: jax.device_put(x, NamedSharding(mesh, places.get(name, P())))
            for name, x in given.items()
        }
        compiled = compiled_for(run, x)
        return compiled, compiled(x)


def spec(layout, page, heads):
    """Of a cache whose pages and heads are split over these axes."""
    axes = dict(p=page, k=heads)
    return P(*(axes.get(letter) for letter in ("pskh" if layout == "fused" else layout)))


def part_of(x):
    """The shape of a device's part."""
    return x.sharding.shard_shape(x.shape)


@both_kinds
@pytest.mark.parametrize("layout", ("pskh", "skph"))
def test_contiguous_by_batch_and_heads(kind, layout):
    problem = Problem(dataclasses.replace(CONTIGUOUS, layout=layout))
    rows, cache = P("data", None, "model"), spec(layout, "data", "model")
    places = dict(query=rows, key=rows, value=rows, key_cache=cache, value_cache=cache)
    places |= dict(cache_lengths=P("data"))
    compiled, got = run_on(mesh_of(kind, data=2, model=4), problem, places)
    assert not collectives(compiled)
    cached.check(problem, got)
    assert part_of(got[0]) == (2, 2, 2, 16)
    assert got[2].size == 8 * np.prod(part_of(got[2])) and 16 in part_of(got[2])


@both_kinds
@pytest.mark.parametrize("layout", ("kpsh", "fused"))
def test_pages_by_heads(kind, layout):
    problem = Problem(dataclasses.replace(BASE, layout=layout, dtype="bfloat16"))
    rows, cache = P(None, None, "model"), spec(layout, None, "model")
    places = dict(query=rows, key=rows, value=rows, key_cache=cache, value_cache=cache)
    compiled, got = run_on(mesh_of(kind, model=4), problem, places)
    assert not collectives(compiled)
    cached.check(problem, got)
    assert got[2].size == 4 * np.prod(part_of(got[2]))


def test_more_devices_than_key_heads():
    """Query heads are brought to the split of key/value heads; the cache stays where it is."""
    problem = Problem(dataclasses.replace(BASE, heads_kv=2, appends=False))
    places = dict(query=P(None, None, ("a", "b")), key_cache=P(None, None, "a"))
    places |= dict(value_cache=P(None, None, "a"))
    compiled, got = run_on(mesh_of(a=2, b=4), problem, places)
    query_bytes = problem.query.nbytes
    assert all(size <= query_bytes for _, size in collectives(compiled))
    cached.check(problem, got)


SPLIT = dict(key_cache=P("x"), value_cache=P("x"))


@pytest.mark.parametrize(
    ("kind", "error"),
    [(AxisType.Auto, Exception), (AxisType.Explicit, ValueError)],
    ids=["automatic", "explicit"],
)
def test_split_pages_raise(kind, error):
    """With what to do; in place of a program that gathers the cache."""
    case = CachedCase(lengths=(13, 0), rows=2, head_dim=16, width=5)
    assert Problem(case).pages % 4 == 0
    with pytest.raises(error, match="a cache arrives with its pages split over mesh axis 'x'"):
        run_on(mesh_of(kind, x=4), Problem(case), SPLIT)
    with pytest.raises(error, match="its slots split over mesh axis 'x'; .* jax.shard_map"):
        run_on(mesh_of(kind, x=4), Problem(case), dict(value_cache=P(None, "x")))


def test_local_pages_inside_shard_map():
    """Each device has sequences and pages of its own, numbered from 0."""
    problems = [Problem(dataclasses.replace(BASE, seed=seed)) for seed in range(4)]
    given = [problem.arguments() for problem in problems]
    arrays = [np.concatenate(x) for x in zip(*(arrays for arrays, _ in given), strict=True)]
    names = ("cache_lengths", "block_tables")
    index = [np.concatenate([options[name] for _, options in given]) for name in names]

    def local(arrays, index):
        query, *caches, key, value = arrays
        where = dict(zip(names, index, strict=True))
        caches = append_to_cache(*caches, key, value, **where)
        lengths = where.pop("cache_lengths") + query.shape[1]
        attend = functools.partial(cached_attention, return_residual=True)
        return *attend(query, *caches, cache_lengths=lengths, **where), *caches

    mapped = jax.shard_map(local, mesh=mesh_of(x=4), in_specs=P("x"), out_specs=P("x"))
    compiled = compiled_for(mapped, arrays, index)
    assert not collectives(compiled)
    parts = [np.split(np.asarray(x), 4) for x in compiled(arrays, index)]
    for problem, *got in zip(problems, *parts, strict=True):
        cached.check(problem, got)
