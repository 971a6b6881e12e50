"""Inputs at the ends of their ranges, through XLA: huge scores, single keys, float16 gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import Case
from contract import Implementation, check_results
from jax_fa3 import dot_product_attention

XLA = Implementation("xla")


@pytest.mark.parametrize(
    "case",
    [
        Case(seqlen_q=9, seqlen_k=70, heads_q=4, causal=True, offset=61),
        Case(seqlen_q=9, seqlen_k=70, heads_q=4, key_lengths=(70, 1)),
    ],
    ids=["causal", "one key"],
)
def test_rows_whose_scores_are_far_from_zero(case, product=-524288.0):
    """query . key is `product` and something of order 10: no finite number stands for -inf."""
    query, key, *rest = case.inputs()
    query[..., 0], key[..., 0] = 448, product / 448
    check_results(XLA, case, (query, key, *rest))


def test_rows_of_both_signs():
    case = Case(seqlen_q=9, seqlen_k=70)
    query, key, *rest = case.inputs()
    query[..., 0], key[..., 0] = 448, -2.45e5 / 448
    query[:, ::2] *= query.dtype.type(-1)  # rows at opposite ends,
    key[:, 35:, :, 0] *= key.dtype.type(-1)  # and keys within a row
    check_results(XLA, case, (query, key, *rest))


@pytest.mark.parametrize(("size", "dtype"), [(133120, "bfloat16"), (1000, "float16")])
def test_equal_scores_of_any_size_give_equal_weights(size, dtype):
    """s * scale - max * scale is 0. Each causal row is the mean of its values."""
    x = np.full((1, 20, 2, 64), size, dtype)
    value = Case(batch=1, seqlen_k=20, dtype=dtype).inputs()[2]
    call = jax.jit(lambda *x: dot_product_attention(*x, is_causal=True, implementation="xla"))
    count = np.arange(1, 21)[None, :, None, None]
    mean = value.astype(np.float64).cumsum(1) / count
    np.testing.assert_allclose(np.asarray(call(x, x, value), np.float64), mean, atol=0.02)


def test_one_key_has_weight_one_whatever_its_score():
    case = Case(batch=1, seqlen_q=1, seqlen_k=1)
    query, key, value, dout, _ = case.inputs()
    query, key = np.full_like(query, 133120), np.full_like(key, 133120)
    call = jax.jit(lambda *x: dot_product_attention(*x, implementation="xla"))
    out, vjp = jax.vjp(call, query, key, value)
    dquery, dkey, dvalue = vjp(jnp.asarray(dout))
    np.testing.assert_array_equal(out, value)
    np.testing.assert_array_equal(dvalue, dout)
    assert not np.any(dquery) and not np.any(dkey)


def test_weights_of_the_backward_pass_at_large_scores():
    """The LSE is a float32, so weights are off by a factor up to exp(|LSE| / 2^24): docs/api.md."""
    score, keys, rows = 1e6, 300, 8
    side = np.sqrt(score / 8)
    query, key = (np.full((1, n, 1, 64), side / 8**0.5, "bfloat16") for n in (rows, keys))
    score = float(query[0, 0, 0, 0]) ** 2 * 64 / 8
    dout = np.ones_like(query)
    call = jax.jit(lambda v: dot_product_attention(query, key, v, implementation="xla"))
    (dvalue,) = jax.vjp(call, np.ones_like(key))[1](jnp.asarray(dout))
    factor = np.asarray(dvalue, np.float64) / (rows / keys)
    assert np.abs(np.log(factor)).max() <= score / 2**24 + 2**-8


CACHES = {
    "static offset": (dict(query_offset=4), (4, 4)),
    "offsets": (dict(query_offset=np.array([-1, 9], "int32")), (-1, 9)),
    "offsets and lengths": (
        dict(
            query_offset=np.array([2, 20], "int32"),
            query_seq_lengths=np.array([3, 1], "int32"),
            key_value_seq_lengths=np.array([70, 7], "int32"),
        ),
        (0, 2),
    ),
    "window": (dict(query_offset=4, local_window_size=(3, 2)), (6, 6)),
}


@pytest.mark.parametrize("options", CACHES)
def test_unwritten_keys_of_a_cache_reach_nothing(options):
    """Five rows: NaN and zeros behind the last key that the last one sees are the same."""
    options, last = CACHES[options]
    query, key, value, dout, _ = Case(seqlen_q=5, seqlen_k=70, dtype="float32").inputs()
    is_causal = "local_window_size" not in options

    def run(key, value):
        def call(*x):
            return dot_product_attention(*x, is_causal=is_causal, implementation="xla", **options)

        out, vjp = jax.vjp(call, query, key, value)
        return out, *vjp(dout)

    behind = np.arange(70) >= 5 + np.array(last)[:, None]
    results = [
        jax.jit(run)(*(np.where(behind[..., None, None], fill, x) for x in (key, value)))
        for fill in (0, np.float32(np.nan))
    ]
    for zeros, nans in zip(*results, strict=True):
        np.testing.assert_array_equal(zeros, nans)
    assert np.any(results[0][0])


def test_float16_gradients_scale_with_their_cotangents(scale=2.0**14):
    """Few keys and large values make dS larger than float16, and not dQ."""
    case = Case(seqlen_q=33, seqlen_k=3, dtype="float16", query_lengths=(33, 9))
    query, key, value, dout, dlse = case.inputs()
    key, value = key * np.float16(2**-6), value * np.float16(4)
    dout = np.clip(dout, -1.9, 1.9) * np.float16(scale)
    inputs = query, key, value, dout, dlse * np.float32(scale)
    results = XLA.run(case, inputs)
    usual = XLA.run(case, (*inputs[:3], dout / np.float16(scale), dlse))
    got, want = (np.asarray(x.dquery, np.float64) for x in (results, usual))
    assert np.isfinite(got).all() and np.any(got)
    smallest = 2**-24  # of float16, where the small ones of the two are rounded
    np.testing.assert_allclose(got, scale * want, rtol=2**-9, atol=smallest * scale)
