"""Packed documents on the kernels, beside the shared cases: tables and what is promised of them."""

import dataclasses
import zlib

import jax
import numpy as np
import pytest
from kernels import KERNELS, for_kernels

import jax_fa3
import packed
import visibility
from cases import PACKED


@pytest.mark.parametrize("kind", visibility.KINDS)
def test_table_is_the_models(kind):
    rng = np.random.default_rng(zlib.crc32(kind.encode()))
    for most in (200, 200, 200, 700):
        seqlen_q, seqlen_k, sources = visibility.random_problem(rng, kind, most)
        arrays = {name: x for name, x in sources.items() if isinstance(x, np.ndarray)}
        static = {name: x for name, x in sources.items() if name not in arrays}

        def make(arrays, static=static, seqlens=(seqlen_q, seqlen_k)):
            return jax_fa3.make_visibility(
                **arrays, **static, seqlen_q=seqlens[0], seqlen_k=seqlens[1]
            )

        want = visibility.model(seqlen_q, seqlen_k, **sources)
        np.testing.assert_array_equal(jax.jit(make)(arrays).table, want)


@pytest.mark.parametrize("case", PACKED[::2], ids=lambda case: case.name)
def test_made_once(case):
    packed.check_made_once(KERNELS, for_kernels(case))


@pytest.mark.parametrize(
    ("case", "lengths", "of_keys"), packed.VARLEN, ids=lambda x: getattr(x, "name", None)
)
def test_varlen(case, lengths, of_keys):
    packed.check_varlen(KERNELS, case, lengths, of_keys)


def test_documents_change_places():
    packed.check_permutation(KERNELS, packed.PERMUTED_CASE, (3, 1, 4, 0, 2))


@pytest.mark.parametrize("causal", [False, True])
def test_ids_that_come_back_give_nan(causal):
    case = dataclasses.replace(packed.ILLEGAL_CASE, causal=causal)
    packed.check_illegal(KERNELS, case, packed.illegal_ids())
