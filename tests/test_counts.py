"""Lengths and offsets as NumPy and Python have them: int64 arrays and lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa3

NAMES = ["query_seq_lengths", "key_value_seq_lengths", "query_offset"]


def call(name, counts):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 2, 16)), "float32")
    given = dict(is_causal=True, implementation="xla") | {name: counts}
    return np.asarray(jax_fa3.dot_product_attention(x, x, x, **given))


@pytest.mark.parametrize("name", NAMES)
def test_numpy_int64(name):
    expected = call(name, np.array([3, 5], "int32"))
    np.testing.assert_array_equal(call(name, np.array([3, 5])), expected)
    if name != "query_offset":
        np.testing.assert_array_equal(call(name, [3, 5]), expected)


@pytest.mark.parametrize("name", NAMES)
def test_traced_int64(name):
    expected = call(name, np.array([3, 5], "int32"))
    with jax.enable_x64(True):
        got = jax.jit(lambda counts: jax_fa3.dot_product_attention(*inputs(), **{name: counts}))
        got = got.lower(jax.ShapeDtypeStruct((2,), "int64"))
    assert got.out_info.shape == expected.shape


def inputs():
    return [jnp.zeros((2, 8, 2, 16), "float32")] * 3


@pytest.mark.parametrize("name", NAMES)
def test_is_supported(name):
    x = jax.ShapeDtypeStruct((2, 8, 2, 16), "bfloat16")
    reasons = [
        jax_fa3.is_supported(x, x, x, **{name: counts})
        for counts in (np.array([3, 5], "int32"), np.array([3, 5]))
    ]
    assert reasons[0] == reasons[1]
