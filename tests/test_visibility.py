"""Tables of visibility, and calls that have one."""

import zlib

import numpy as np
import pytest

import jax_fa3
import visibility
from jax_fa3.visibility.layout import Layout
from meshes import run

# ---- the table


@pytest.mark.parametrize("kind", visibility.KINDS)
def test_table_is_the_models(kind):
    """Hundreds of random problems; traced, so that ids may break their rule."""
    rng = np.random.default_rng(zlib.crc32(kind.encode()))
    for _ in range(5):
        seqlen_q, seqlen_k, sources = visibility.random_problem(rng, kind)
        want = visibility.model(seqlen_q, seqlen_k, **sources)
        arrays = {name: x for name, x in sources.items() if isinstance(x, np.ndarray)}
        static = {name: x for name, x in sources.items() if name not in arrays}

        def make(arrays, static=static, seqlens=(seqlen_q, seqlen_k)):
            return jax_fa3.make_visibility(
                **arrays, **static, seqlen_q=seqlens[0], seqlen_k=seqlens[1]
            )

        made = run(make, arrays)
        np.testing.assert_array_equal(made.table, want)
        assert want.shape[-1] == Layout.of(seqlen_q, seqlen_k).words


def test_the_models_problems_are_of_every_kind():
    """Planes that are monotone, valid, neither or both, with and without rows that see nothing."""
    rng, flags = np.random.default_rng(0), set()
    for kind in visibility.KINDS:
        for _ in range(20):
            seqlen_q, seqlen_k, sources = visibility.random_problem(rng, kind, most=80)
            table = visibility.model(seqlen_q, seqlen_k, **sources)
            flags |= set(table[..., 0].ravel().tolist())
    assert flags == {1, 2, 3}
