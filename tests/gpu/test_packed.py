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


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("lengths", [(200,), (1100, 1300)])
def test_no_weight_behind_the_keys_of_a_tile(lengths, head_dim):
    """Where all logits are far below 0, a key of zeros would have a weight that float16 does not
    hold. All weights are equal here, so that dQ is 0."""
    rows = sum(lengths)
    random = np.random.default_rng(head_dim)
    value, dout = (random.standard_normal((1, rows, 1, head_dim)).astype("float16") for _ in "vo")
    query = np.full_like(value, np.sqrt(32 / np.sqrt(head_dim)))  # logits of -32
    ids = np.repeat(np.arange(1, 1 + len(lengths), dtype=np.int32), lengths)[None]

    def gradients(implementation):
        def attend(query, key, value):
            return jax_fa3.dot_product_attention(
                query, key, value, query_segment_ids=ids, implementation=implementation
            )

        def all_of(dout):
            return jax.vjp(attend, query, -query, value)[1](dout)

        return map(np.asarray, jax.jit(all_of)(dout))

    for name, x, want in zip("qkv", gradients("fa3"), gradients("xla"), strict=True):
        np.testing.assert_allclose(x, want, rtol=0.02, atol=0.005, err_msg=f"d{name}")
