"""The table of visibility that the kernel makes: bit by bit the slow model's, and XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import spoil_free_memory

import visibility
from jax_fa3 import make_visibility
from jax_fa3.visibility import public


def made(sources, seqlens):
    """The kernel's table, in memory that was spoilt."""
    arrays = {name: x for name, x in sources.items() if isinstance(x, np.ndarray)}
    static = {name: x for name, x in sources.items() if name not in arrays}

    def make(arrays):
        seqlen_q, seqlen_k = seqlens
        return make_visibility(**arrays, **static, seqlen_q=seqlen_q, seqlen_k=seqlen_k).table

    executable = jax.jit(make).lower(arrays).compile()
    assert "jax_fa3_visibility" in executable.as_text()
    spoil_free_memory([executable.out_info.size * 4])
    return np.asarray(executable(arrays))


@pytest.mark.parametrize("kind", visibility.KINDS)
def test_the_models_table(kind):
    random = np.random.default_rng(visibility.KINDS.index(kind))
    for _ in range(12):
        *seqlens, sources = visibility.random_problem(random, kind)
        want = visibility.model(*seqlens, **sources)
        got = made(sources, seqlens)
        assert got.shape == want.shape
        np.testing.assert_array_equal(got, want, err_msg=f"{kind} {seqlens} {sources}")


LARGE = (4095, 4096, 4097, 70_001, 2**20 + 3)


@pytest.mark.parametrize("seqlen", LARGE)
@pytest.mark.parametrize("kind", ("sorted", "shuffled", "returning", "both", "intervals", "holes"))
def test_xlas_table_of_long_sequences(kind, seqlen):
    random = np.random.default_rng(seqlen)
    ids = np.cumsum(random.random((2, seqlen)) < 0.01, axis=1).astype(np.int32)
    if kind == "shuffled":
        ids = random.permutation(int(ids.max()) + 1).astype(np.int32)[ids]
    if kind == "returning":
        ids[1, seqlen // 2] = ids[1, 0]
    ids[0, -seqlen // 3 :] = 0
    sources = dict(query_segment_ids=ids)
    if kind == "both":  # the keys' begin with zeros, and end with them or not
        sources["key_value_segment_ids"] = ids[::-1].copy()
    if kind in ("intervals", "holes"):
        start = random.integers(0, seqlen, (2, seqlen)).astype(np.int32)
        end = start + 100
        if kind == "holes":  # rises but for long stretches of rows that see nothing
            start.sort(axis=1)
            end = np.where(random.random((2, seqlen)) < 0.999, start, start + 100)
        sources = dict(kv_start=start, kv_end=end.astype(np.int32))
    got = made(sources, (seqlen, seqlen))
    arrays = {name: jnp.asarray(x) for name, x in sources.items()}
    want = public.of_sources(arrays, seqlens=(seqlen, seqlen), route="xla")
    np.testing.assert_array_equal(got, np.asarray(want.table))
