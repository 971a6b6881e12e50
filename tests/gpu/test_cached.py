"""Caches on the kernels: random problems of all kinds against float64, with NaN wherever nothing
may look, appends, hostile tables, and random steps of continuous batching."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import attend_to_cache, cached_case, many_rows_case

import cached
from cached import CachedCase, Problem
from jax_fa3 import append_to_cache, cached_attention

NUMBERS, IN_A_TEST, OF_MANY_ROWS = 320, 8, 40


@pytest.mark.parametrize("first", range(0, NUMBERS, IN_A_TEST))
def test_random_problems(first):
    for seed in range(first, first + IN_A_TEST):
        problem = Problem(cached_case(seed))
        cached.check(problem, attend_to_cache(problem))


@pytest.mark.parametrize("first", range(0, OF_MANY_ROWS, IN_A_TEST // 2))
def test_random_problems_of_many_rows(first):
    for seed in range(first, first + IN_A_TEST // 2):
        problem = Problem(many_rows_case(seed))
        cached.check(problem, attend_to_cache(problem))


@pytest.mark.parametrize("page_size", (8, 16, 24, 64, 128, 256, None))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_many_rows_at_every_kind_of_length(page_size, head_dim):
    """None, one, whole pages and what a cache holds; the middle has parts of several CTAs."""
    size = page_size or 128
    case = CachedCase(
        lengths=(0, 1, 3 * size, 6 * size, 2000), rows=50, heads_q=6, heads_kv=2,
        head_dim=head_dim, dtype="bfloat16", page_size=page_size, width=2048 // (page_size or 8),
    )  # fmt: skip
    problem = Problem(case)
    cached.check(problem, attend_to_cache(problem))


def test_ragged_rows_of_one_long_sequence_among_many():
    case = CachedCase(
        lengths=(*range(100, 900, 20), 3000), counts=(*[1] * 40, 200), heads_q=8, heads_kv=2,
        head_dim=128, dtype="bfloat16", page_size=16, width=200,
    )  # fmt: skip
    problem = Problem(case)
    cached.check(problem, attend_to_cache(problem))


@pytest.mark.parametrize("rows", (1, 70))
def test_parts_of_huge_logits(rows):
    """Up to 10^5, of which float32 holds no more than the differences."""
    case = CachedCase(
        lengths=(6000, 3000), rows=rows, heads_q=8, heads_kv=2, head_dim=128, dtype="bfloat16",
        page_size=64, width=100, scale=2000.0,
    )  # fmt: skip
    problem = Problem(case)
    cached.check(problem, attend_to_cache(problem))


@pytest.mark.parametrize("layout", cached.LAYOUTS)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("rows", (2, 70))
def test_layouts_give_the_bits_of_pages(layout, head_dim, rows):
    base = CachedCase(
        lengths=(700, 0, 1, 1024), rows=rows, heads_q=8, heads_kv=2, head_dim=head_dim,
        dtype="bfloat16", page_size=64, width=16,
    )  # fmt: skip
    want = attend_to_cache(Problem(base))
    got = attend_to_cache(Problem(dataclasses.replace(base, layout=layout)))
    for x, y in zip(got, want, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("length", (1, 63, 64, 65, 127, 128, 129, 4095, 4096))
@pytest.mark.parametrize("rows", (1, 64))
def test_values_of_one_give_one(length, rows):
    """Whatever stands behind the last key: the weights of a row add up to 1 exactly."""
    query = np.zeros((2, rows, 8, 128), "bfloat16")
    cache = np.full((2, 4096, 2, 128), np.nan, "bfloat16")
    keys, values = cache.copy(), cache
    keys[:, :length], values[:, :length] = 0, 1
    lengths = np.full(2, length, np.int32)
    how = dict(cache_lengths=lengths, is_causal=False, implementation="fa3")
    out = cached_attention(query, keys, values, **how)
    assert np.all(np.asarray(out) == 1)


@pytest.mark.parametrize("rows", (4, 24))
def test_repeats_bit_by_bit(rows):
    """One compiled program, lengths from nothing to capacity and back, many times each."""
    base = CachedCase(
        lengths=(5000, 1, 333, 8192), rows=rows, heads_q=32, heads_kv=8, head_dim=128,
        dtype="bfloat16", page_size=16, width=512,
    )  # fmt: skip
    problem = Problem(base)
    arrays, options = problem.arguments()
    lengths, tables = options.pop("cache_lengths"), options.pop("block_tables")
    run = jax.jit(functools.partial(cached_attention, implementation="fa3", **options))
    wants = {}
    for i in range(60):
        now = np.asarray(lengths) if i % 3 == 0 else np.full(4, (0, 8192)[i % 2], np.int32)
        results = run(*arrays, cache_lengths=now, block_tables=tables)
        got = [np.asarray(x).tobytes() for x in results]
        assert wants.setdefault(now.tobytes(), got) == got
    cached.check(problem, run(*arrays, cache_lengths=lengths, block_tables=tables))


@pytest.mark.parametrize("rows", (dict(), dict(counts=(2, 0, 3, 1)), dict(rows=40)))
@pytest.mark.parametrize("seed", range(6))
def test_hostile_index_arrays(seed, rows):
    sizes = dict(heads_q=8, head_dim=128, dtype="bfloat16", page_size=16, width=8)
    run = jax.jit(functools.partial(cached_attention, implementation="fa3", return_residual=True))
    cached.check_hostile(run, seed, **rows, **sizes)


@pytest.mark.parametrize("page_size", (1, 5, 16, None))
@pytest.mark.parametrize("layout", cached.LAYOUTS)
def test_append(page_size, layout):
    """Any page size, at capacity too; a cache that is not donated keeps its bits."""
    case = CachedCase(
        lengths=(0, 33, 44), rows=6, appends=True, heads_q=4, heads_kv=2, head_dim=80,
        dtype="float16", page_size=page_size, width=48 // (page_size or 8), layout=layout,
    )  # fmt: skip
    problem = Problem(case)
    (_, *arrays), options = problem.arguments()
    names = {"cache_lengths", "block_tables", "layout"} & options.keys()
    where = {name: options[name] for name in names}
    given = [x if x is None else jnp.asarray(x) for x in arrays]
    got = append_to_cache(*given, **where, implementation="fa3")
    for x, y, z in zip(got, problem.expected_caches(), given, strict=False):
        assert (x is None) == (y is None)
        if x is not None:
            assert np.asarray(x).tobytes() == y.tobytes()
            before = arrays[0] if z is given[0] else arrays[1]
            assert np.asarray(z).tobytes() == before.tobytes()


def test_append_into_the_last_page_of_a_large_pool():
    """Beyond 2^31 elements, which 32 bits do not count."""
    pages, size, heads, dim = 70_000, 64, 4, 128
    assert pages * size * heads * dim > 1 << 31
    pool = jnp.zeros((pages, size, heads, dim), jnp.bfloat16)
    new = jax.random.normal(jax.random.key(0), (1, 3, heads // 2, dim), jnp.bfloat16)
    where = dict(
        cache_lengths=np.array([62], np.int32),
        block_tables=np.array([[3, pages - 1]], np.int32),
        layout="fused",
        implementation="fa3",
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def run(pool, new):
        return append_to_cache(pool, None, new, new, **where)[0]

    got = run(pool, new)
    written = np.asarray(got[pages - 1, 0].reshape(heads // 2, 2, dim))
    for i in range(2):
        np.testing.assert_array_equal(written[:, i], np.asarray(new[0, 2]))
    assert int(jnp.count_nonzero(got[4 : pages - 1])) == 0


# ---- continuous batching


class Batch:
    """Seats of random sequences over one pool, and their keys and values as plain lists."""

    def __init__(self, seed, seats=6, page_size=16, width=12, pages=50):
        self.rng = np.random.default_rng(seed)
        self.size, self.width = page_size, width
        self.free = list(self.rng.permutation(pages))
        self.held = [[] for _ in range(seats)]
        self.keys = [np.zeros((0, 2, 128), "bfloat16") for _ in range(seats)]
        self.values = list(self.keys)

    def end_some(self):
        for b in range(len(self.held)):
            if self.rng.random() < 0.03 or len(self.keys[b]) > self.size * self.width - 40:
                self.free += self.held[b]
                self.held[b] = []
                self.keys[b], self.values[b] = self.keys[b][:0], self.values[b][:0]

    def draw_counts(self, rows):
        """How many rows each seat appends: a piece of a prompt, a token, or nothing, as far as
        there are pages."""
        counts = np.zeros(len(self.held), np.int32)
        for b in range(len(self.held)):
            count = int(self.rng.integers(0, rows + 1))
            needed = -(-(len(self.keys[b]) + count) // self.size) - len(self.held[b])
            if needed <= len(self.free):
                self.held[b] += [self.free.pop() for _ in range(max(needed, 0))]
                counts[b] = count
        return counts

    def tables(self):
        tables = np.full((len(self.held), self.width), -1, np.int32)
        for b, held in enumerate(self.held):
            tables[b, : len(held)] = held
        return tables


@pytest.mark.parametrize("seed", range(4))
def test_continuous_batching(seed):
    """Random steps: arrivals, prompts in pieces, ends and pages that are used again."""
    batch, rows, pool = Batch(seed), (16, 32)[seed % 2], 50
    caches = [jnp.full((pool, batch.size, 2, 128), jnp.nan, jnp.bfloat16)] * 2
    caches = [jnp.array(x) for x in caches]

    run = functools.partial(cached_attention, implementation="fa3", return_residual=True)
    step = jax.jit(run, donate_argnums=(1, 2))
    for number in range(2500):
        batch.end_some()
        counts = batch.draw_counts(1 if number % 2 else rows)
        t = 1 if number % 2 else rows
        draw = functools.partial(batch.rng.standard_normal, dtype=np.float32)
        query = draw((6, t, 8, 128)).astype("bfloat16")
        key, value = (draw((6, t, 2, 128)).astype("bfloat16") for _ in "kv")
        lengths = np.array([len(x) for x in batch.keys], np.int32)
        where = dict(cache_lengths=lengths, block_tables=batch.tables(), new_lengths=counts)
        out, lse, *caches = step(query, *caches, key, value, **where)
        for b, n in enumerate(counts):
            batch.keys[b] = np.concatenate([batch.keys[b], key[b, :n]])
            batch.values[b] = np.concatenate([batch.values[b], value[b, :n]])
        if number % 10:
            continue
        out, lse = np.asarray(out).astype(np.float64), np.asarray(lse)
        for b, n in enumerate(counts):
            assert not np.any(out[b, n:]) and np.isneginf(lse[b, n:]).all()
            for i in range(n):
                end = lengths[b] + i + 1
                want, want_lse = cached.attention(
                    query[b, i], batch.keys[b][:end], batch.values[b][:end], None, "exact"
                )
                np.testing.assert_allclose(out[b, i], want, atol=2e-2, rtol=2e-2)
                np.testing.assert_allclose(lse[b, i], want_lse, atol=2e-4, rtol=2e-5)
    held = sum(map(len, batch.held))
    assert held + len(batch.free) == pool
    assert len(set(batch.free).union(*batch.held)) == pool
