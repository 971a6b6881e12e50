"""The table of visibility of long sequences that the kernel makes: bit by bit XLA's. test_packed.py
compares short ones with the slow model."""

import jax
import numpy as np
import pytest
from kernels import spoil_free_memory

from jax_fa3 import make_visibility
from jax_fa3.visibility import public


def made(sources, seqlen):
    """The kernel's table, in memory that was spoilt."""

    def make(sources):
        return make_visibility(**sources, seqlen_q=seqlen, seqlen_k=seqlen).table

    executable = jax.jit(make).lower(sources).compile()
    assert "jax_fa3_visibility" in executable.as_text()
    spoil_free_memory([executable.out_info.size * 4])
    return np.asarray(executable(sources))


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
    got = made(sources, seqlen)

    def by_xla(arrays):
        return public.of_sources(arrays, seqlens=(seqlen, seqlen), how="xla").table

    np.testing.assert_array_equal(got, jax.jit(by_xla)(sources))
