"""What docs/differences.md says of calls: each row, beside jax.nn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa3 import dot_product_attention

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 1, 5, 2, 8)).astype(np.float32)
THEIRS = jax.nn.dot_product_attention


def test_numpy_float64():
    x = X.astype(np.float64)
    assert THEIRS(*x).dtype == "float32"
    with pytest.raises(TypeError, match="query has dtype float64; expected"):
        dot_product_attention(*x)


def test_float64_in_64_bit_mode():
    with jax.enable_x64(True):
        x = jnp.asarray(X, "float64")
        assert THEIRS(*x).dtype == "float64"
        with pytest.raises(TypeError, match="query has dtype float64; expected"):
            dot_product_attention(*x)


def test_complex64():
    x = jnp.asarray(X, "complex64")
    assert THEIRS(*x).dtype == "complex64"
    with pytest.raises(TypeError, match="query has dtype complex64; expected"):
        dot_product_attention(*x)


def test_traced_scale():
    query, key, value = X
    want = jax.jit(lambda scale: THEIRS(*X, scale=scale))(0.5)
    with pytest.raises(TypeError, match="scale is a traced array.*multiply query"):
        jax.jit(lambda scale: dot_product_attention(*X, scale=scale))(0.5)
    cure = jax.jit(lambda scale: dot_product_attention(query * scale, key, value, scale=1))(0.5)
    np.testing.assert_allclose(cure, want, atol=1e-6)
    np.testing.assert_allclose(dot_product_attention(*X, scale=jnp.float32(0.5)), want, atol=1e-6)


def test_cudnn():
    with pytest.raises(ValueError, match="implementation is 'cudnn'; expected .*jax.nn"):
        dot_product_attention(*X, implementation="cudnn")


def test_precision():
    """The products of float32 have it, forward and backward, and those of value alone too."""

    def products(function, precision):
        with jax.default_matmul_precision(precision):
            gradient = jax.grad(lambda *x: function(*x).sum(), (0, 1, 2))
            return str(jax.make_jaxpr(gradient)(*X)).count("HIGHEST")

    assert products(THEIRS, "highest") > 0 == products(THEIRS, "default")
    assert products(dot_product_attention, "highest") >= 2 * 5  # operands of five products
    assert products(dot_product_attention, "default") == 0


def test_transpose_in_value():
    """vjp gives it; by itself only what JAX makes of ordinary code may have one (0.10.2 does)."""

    def call(value, function=dot_product_attention, dtype="float32"):
        return function(*X[:2].astype(dtype), value)

    (want,) = jax.linear_transpose(lambda value: call(value, THEIRS), X[2])(X[0])
    (ours,) = jax.vjp(call, X[2])[1](X[0])
    np.testing.assert_allclose(ours, want, atol=1e-6)
    half = jnp.asarray(X, "bfloat16")
    with pytest.raises((NotImplementedError, RuntimeError, TypeError)):
        jax.linear_transpose(lambda value: call(value, dtype="bfloat16"), half[2])(half[0])


def test_rotary_embeddings():
    """The recipe of docs/flax.md beside Flax's own function."""
    nnx = pytest.importorskip("flax.nnx")
    if not hasattr(nnx, "RoPE"):
        pytest.skip("this Flax has no nnx.RoPE")
    from jax_fa3.flax import attention_fn

    rope = nnx.RoPE(embedding_size=8, max_seq_len=16)
    rotate = jax.vmap(rope, -2, -2)
    ours = attention_fn(rotate(X[0]), rotate(X[1]), X[2])
    np.testing.assert_allclose(ours, nnx.dot_product_attention_with_rope(*X, rope=rope), atol=1e-5)
