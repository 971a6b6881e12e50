"""jax_fa3.keras against a stand-in for the modules of Keras that it touches.

docs/coming_from.md says with which version of Keras it was run.
"""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa3.keras


def unreplaced(*args, **kwargs):
    raise AssertionError("Keras's own attention ran")


@pytest.fixture
def backend(monkeypatch):
    """Keras's module of functions for JAX, as far as it is touched."""
    nn = types.SimpleNamespace(
        dot_product_attention=unreplaced,
        convert_to_tensor=lambda x, dtype=None: jnp.asarray(x, dtype),
        name="jax",
    )
    keras = types.SimpleNamespace(backend=types.SimpleNamespace(backend=lambda: nn.name))
    monkeypatch.setitem(sys.modules, "keras", keras)
    monkeypatch.setitem(sys.modules, jax_fa3.keras.BACKEND, nn)
    return nn


@pytest.fixture
def qkv():
    rng = np.random.default_rng()
    return [rng.normal(size=(2, 12, heads, 16)).astype(np.float32) for heads in (4, 2, 2)]


def test_calls_mean_what_those_of_jax_nn_do(backend, qkv):
    rng = np.random.default_rng()
    bias = rng.normal(size=(2, 4, 12, 12))  # Keras casts it
    mask = rng.random((2, 1, 12, 12)) < 0.7
    mask[..., 0] = True  # no row is empty
    want = jax.nn.dot_product_attention(
        *qkv, bias=bias.astype(np.float32), mask=mask, scale=0.3, is_causal=True
    )
    with jax_fa3.keras.attention():
        got = backend.dot_product_attention(
            *qkv, bias=bias, mask=mask.astype(int), scale=0.3, is_causal=True
        )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_mixed_dtypes_are_promoted(backend, qkv):
    q, k, v = qkv
    with jax_fa3.keras.attention():
        out = backend.dot_product_attention(jnp.asarray(q, jnp.bfloat16), k, v)
    assert out.dtype == jnp.float32


def test_flash_attention_chooses(backend, qkv):
    with jax_fa3.keras.attention():
        with pytest.raises(NotImplementedError, match="implementation is 'fa3'"):
            backend.dot_product_attention(*qkv, flash_attention=True)
        (call,) = jax_fa3.explain(
            lambda *x: backend.dot_product_attention(*x, flash_attention=False), *qkv
        )
    assert call.reason == "implementation is 'xla'"
    with jax_fa3.keras.attention("fa3"), pytest.raises(NotImplementedError, match="'fa3'"):
        backend.dot_product_attention(*qkv)


def test_keras_cap_is_refused(backend, qkv):
    with jax_fa3.keras.attention(), pytest.raises(NotImplementedError, match="soft_cap is 3.0"):
        backend.dot_product_attention(*qkv, attn_logits_soft_cap=3.0)


def test_the_context_ends(backend):
    with pytest.raises(KeyError), jax_fa3.keras.attention():
        raise KeyError
    assert backend.dot_product_attention is unreplaced


def test_other_keras(backend, monkeypatch):
    backend.name = "torch"
    with pytest.raises(RuntimeError, match="backend is 'torch'"), jax_fa3.keras.attention():
        pass
    backend.name = "jax"
    del backend.dot_product_attention
    with pytest.raises(RuntimeError, match="has no dot_product"), jax_fa3.keras.attention():
        pass
