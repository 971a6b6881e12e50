"""Attention over caches, and appends, through XLA, against NumPy on gathered keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cached
from cached import LAYOUTS, CachedCase, Problem
from jax_fa3 import append_to_cache, cached_attention
from meshes import compiled_for

BASE = CachedCase(lengths=(13, 0, 41), rows=2, appends=True, heads_q=4, heads_kv=2, head_dim=16)
CASES = (
    BASE,
    CachedCase(lengths=(1, 8, 16, 48)),
    CachedCase(lengths=(5, 30), rows=3, window=(4, 1), causal=False, page_size=None),
    CachedCase(lengths=(5, 47, 48, 46), rows=4, appends=True, page_size=16, width=3),  # at capacity
    CachedCase(lengths=(5, 20, 0), counts=(3, 0, 9), rotary="halves", appends=True),
    CachedCase(lengths=(9, 20), counts=(70, 1), appends=True, width=20, page_size=None),
    CachedCase(lengths=(-5, 2**31 - 1, -(2**31)), rows=2, appends=True),
    CachedCase(lengths=(40, 40), bad_pages=((0, 1), (1, 4)), rows=2, starts=(17, -4), scale=-0.3),
    CachedCase(lengths=(30, 31), rows=6, appends=True, new_lengths=(0, 4), heads_q=6, heads_kv=1),
    CachedCase(lengths=(12, 33), offset=(-2, 20), rows=3, rotary="interleaved", head_dim_v=24),
    CachedCase(lengths=(12, 33), offset=-1, rows=3, scale=0.0, layout="fused", rotary="halves"),
)


def call(problem, **more):
    arrays, options = problem.arguments()
    static = {
        name: options.pop(name)
        for name in ("is_causal", "layout", "local_window_size", "scale", "return_residual")
    }
    if isinstance(options.get("query_offset"), int):
        static["query_offset"] = options.pop("query_offset")
    run = functools.partial(cached_attention, implementation="xla", **static, **more)
    run = functools.partial(run, **{name: x for name, x in options.items() if name == "rotary"})
    index = {name: x for name, x in options.items() if name != "rotary"}
    return compiled_for(lambda arrays, index: run(*arrays, **index), arrays, index)(arrays, index)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_meaning(case):
    problem = Problem(case)
    cached.check(problem, call(problem))


@pytest.mark.parametrize("seed", range(6))
def test_random_problems(seed):
    problem = Problem(cached.random_case(seed))
    cached.check(problem, call(problem))


def test_layouts_and_page_sizes_give_equal_bits():
    """Of one cache: as its pages and its dimensions are only where tokens stand."""
    base = dataclasses.replace(BASE, dtype="bfloat16", rows=3)
    wants = None
    pages = ((8, 6), (16, 3), (None, 6), (8, 6), (16, 3), (None, 6))
    for layout, (page_size, width) in zip((*LAYOUTS, "pskh"), pages, strict=True):
        case = dataclasses.replace(base, layout=layout, page_size=page_size, width=width)
        got = [np.asarray(x).tobytes() for x in call(Problem(case))[:2]]
        wants = wants or got
        assert got == wants, case.name


def test_int64_and_lists():
    problem = Problem(BASE)
    arrays, options = problem.arguments(np.int64)
    options["cache_lengths"] = list(BASE.lengths)
    cached.check(problem, cached_attention(*arrays, **options))


def test_output_in_float32():
    problem = Problem(dataclasses.replace(CASES[1], dtype="bfloat16"))
    out, _ = call(problem, out_dtype=jnp.float32)
    rounded, _ = call(problem)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out.astype(jnp.bfloat16), rounded)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_append_writes_its_slots_alone(layout):
    """At capacity and past it, into bad pages, for no rows: what is not written keeps its bits."""
    case = dataclasses.replace(
        BASE, layout=layout, lengths=(46, 8, 48), rows=4, bad_pages=((1, 1),), dtype="float16"
    )
    problem = Problem(case)
    (_, *arrays), options = problem.arguments()
    where = {name: options[name] for name in ("cache_lengths", "block_tables", "layout")}
    got = append_to_cache(*arrays, **where)
    for x, y in zip(got, problem.expected_caches(), strict=True):
        assert (x is None) == (y is None)
        assert x is None or np.asarray(x).tobytes() == y.tobytes()


def test_append_turns_a_query():
    problem = Problem(dataclasses.replace(BASE, rotary="halves", dtype="bfloat16"))
    (query, *arrays), options = problem.arguments()
    where = {name: options[name] for name in ("cache_lengths", "block_tables", "rotary")}
    *_, turned = append_to_cache(*arrays, **where, query=query)
    for b, i in np.ndindex(BASE.batch, BASE.rows):
        want = problem.turned(query[b, i], BASE.before[b] + i)
        np.testing.assert_allclose(
            *(np.asarray(x, np.float32) for x in (turned[b, i], want)), rtol=2**-7, atol=1e-6
        )


def test_no_rows_and_no_sequences():
    cache, lengths = jnp.zeros((2, 8, 1, 16)), jnp.array([3, 4])
    empty, none = jnp.zeros((2, 0, 2, 16)), jnp.zeros((0, 1, 2, 16))
    assert cached_attention(empty, cache, cache, cache_lengths=lengths).shape == empty.shape
    got = cached_attention(none, cache[:0], cache[:0], cache_lengths=lengths[:0])
    assert got.shape == none.shape
    starts, tokens = jnp.zeros(1, jnp.int32), jnp.full((5, 2, 16), jnp.nan)
    new = jnp.full((5, 1, 16), jnp.nan)
    tables = jnp.zeros((0, 2), jnp.int32)
    out, keys, values = cached_attention(
        tokens, cache, cache, new, new,
        cache_lengths=lengths[:0], block_tables=tables, query_starts=starts,
    )  # fmt: skip
    assert not out.any() and not keys.any() and not values.any()


HOSTILE_STARTS = ((0, 3, 5, 7), (5, 2, 9, 1), (-9, 2**31 - 1, 4, -(2**31)), (3, 3, 3, 3))


def test_hostile_starts():
    """Rows go to sequences as clamped starts that do not fall say."""
    keys = jnp.arange(3.0)[:, None, None, None] + jnp.zeros((3, 8, 1, 16))
    run = jax.jit(
        lambda starts: cached_attention(
            jnp.zeros((7, 1, 16)), keys, keys, cache_lengths=jnp.array([4, 4, 4]),
            query_starts=starts, is_causal=False,
        )
    )  # fmt: skip
    for starts in HOSTILE_STARTS:
        legal = np.maximum.accumulate(np.clip(starts, 0, 7))
        want = np.zeros(7)
        for b in range(3):
            want[legal[b] : legal[b + 1]] = b
        np.testing.assert_array_equal(run(jnp.array(starts))[:, 0, 0], want, str(starts))


@pytest.mark.parametrize("counts", (None, (2, 0, 3, 1)))
def test_hostile_index_arrays(counts):
    """Of sequences whose neighbours must not notice; several draws of one program."""
    run = jax.jit(
        functools.partial(cached_attention, return_residual=True),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    for seed in range(3):
        cached.check_hostile(run, seed, counts=counts, head_dim=16)


STRICT = (CASES[4], CASES[7], CASES[9], CASES[10])


def test_under_strict_settings():
    """No rank is promoted, and 64-bit mode changes no type."""
    types = []
    for x64 in (False, True):
        with jax.numpy_rank_promotion("raise"), jax.enable_x64(x64):
            for case in STRICT:
                arrays, options = Problem(case).arguments()
                run = functools.partial(cached_attention, *arrays, **options)
                types.append([(x.shape, x.dtype) for x in jax.tree.leaves(jax.eval_shape(run))])
    assert types[: len(STRICT)] == types[len(STRICT) :]


# ---- transforms


@pytest.mark.parametrize("layout", ("kpsh", "fused"))
def test_vmap_of_caches(layout):
    """Every array mapped: pages of all caches become those of one."""
    base = dataclasses.replace(BASE, layout=layout, dtype="bfloat16")
    problems = [Problem(dataclasses.replace(base, seed=seed)) for seed in (3, 4)]
    given = [problem.arguments() for problem in problems]
    names = ("cache_lengths", "block_tables")
    static = {name: x for name, x in given[0][1].items() if name not in names}

    def one(arrays, index):
        return cached_attention(*arrays, **dict(zip(names, index, strict=True)), **static)

    arrays = jax.tree.map(lambda *x: np.stack(x), *(arrays for arrays, _ in given))
    index = [np.stack([options[name] for _, options in given]) for name in names]
    got = compiled_for(jax.vmap(one), arrays, index)(arrays, index)
    for i, problem in enumerate(problems):
        cached.check(problem, [None if x is None else x[i] for x in got])


def test_vmap_of_queries_over_one_cache():
    """A contiguous cache that is not mapped is shared, as pages (tests/test_cached_lowering.py)."""
    problem = Problem(dataclasses.replace(BASE, appends=False, page_size=None))
    (query, *caches), options = problem.arguments()
    queries = np.stack([query, 2 * query, -query])
    run = jax.vmap(lambda query, *x: cached_attention(query, *x, **options), (0, None, None))
    got = compiled_for(run, queries, *caches)(queries, *caches)
    for i, query in enumerate(queries):
        problem.query = query.reshape(-1, *query.shape[2:])
        cached.check(problem, [x[i] for x in got])


def test_vmap_of_ragged_queries():
    case = CachedCase(lengths=(5, 20, 0), counts=(3, 0, 9))
    problems = [Problem(case), Problem(dataclasses.replace(case, counts=(5, 1, 6)))]
    arrays, options = problems[0].arguments()
    options.pop("query_starts")
    starts = np.stack([problem.first for problem in problems])
    run = jax.vmap(lambda starts: cached_attention(*arrays, **options, query_starts=starts))
    got = compiled_for(run, starts)(starts)
    for i, problem in enumerate(problems):
        cached.check(problem, [x[i] for x in got])


def test_append_under_vmap_needs_mapped_caches():
    cache, new = jnp.zeros((2, 8, 1, 16)), jnp.zeros((3, 2, 1, 1, 16))
    run = functools.partial(append_to_cache, cache, cache, cache_lengths=jnp.array([0, 1]))
    with pytest.raises(ValueError, match="key_cache is not mapped by jax.vmap"):
        jax.vmap(run)(new, new)


def test_no_gradient():
    cache, query = jnp.zeros((1, 8, 1, 16)), jnp.zeros((1, 1, 1, 16))

    def loss(query):
        return cached_attention(query, cache, cache, cache_lengths=jnp.array([3])).sum()

    with pytest.raises(NotImplementedError, match="cached_attention: .* has no gradient"):
        jax.grad(loss)(query)


def test_in_scan_with_the_cache_in_the_carry():
    """Tokens one by one are tokens at once."""
    problem = Problem(dataclasses.replace(BASE, rows=4, lengths=(13, 0, 36)))
    (query, *arrays), options = problem.arguments()
    lengths = options.pop("cache_lengths")

    def run(caches, rows):
        def step(carry, x):
            caches, lengths = carry
            query, *new = x
            out, lse, *caches = cached_attention(
                query, *caches, *new, cache_lengths=lengths, **options
            )
            return (caches, lengths + 1), (out, lse)

        (caches, _), rows = jax.lax.scan(step, (caches, jnp.asarray(lengths)), rows)
        return *(jnp.moveaxis(x[:, :, 0], 0, 1) for x in rows), *caches

    x = arrays[:2], [np.moveaxis(x, 1, 0)[:, :, None] for x in (query, *arrays[2:])]
    cached.check(problem, compiled_for(run, *x)(*x))
