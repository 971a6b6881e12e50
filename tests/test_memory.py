"""The XLA implementation needs memory linear in the sequence length, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jax_fa3 import dot_product_attention

OPTIONS = {
    "full": {},
    "causal": dict(is_causal=True),
    "window": dict(local_window_size=(100, 20)),
    "offset": dict(is_causal=True, query_offset=7),
    "chunks": dict(is_causal=True, attention_chunk=1000),
}


def gradients(options, query, key, value, lengths):
    def loss(*x):
        out, lse = dot_product_attention(
            *x, key_value_seq_lengths=lengths, return_residual=True, implementation="xla", **options
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isneginf(lse), 0, lse))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(query, key, value)


def operands(seqlen):
    x = jax.ShapeDtypeStruct((1, seqlen, 1, 8), "float32")
    return x, x, x, jax.ShapeDtypeStruct((1,), "int32")


def subjaxprs(jaxpr):
    """A jaxpr and all that it contains."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for leaf in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(leaf, "jaxpr", leaf)
            if hasattr(inner, "eqns"):
                yield from subjaxprs(inner)


def largest_array(jaxpr):
    """Elements of the largest value that any equation makes."""
    return max(
        var.aval.size
        for sub in subjaxprs(jaxpr)
        for equation in sub.eqns
        for var in equation.outvars
        if hasattr(var.aval, "size")
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_value_has_a_score_for_every_pair(options):
    """From 16k tokens to 64k, the largest array grows fourfold at most, not sixteenfold."""
    largest = [
        largest_array(
            jax.make_jaxpr(functools.partial(gradients, options))(*operands(seqlen)).jaxpr
        )
        for seqlen in (1 << 14, 1 << 16)
    ]
    assert largest[1] <= 4 * largest[0]
    assert largest[1] < (1 << 32) // 16


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled_memory_is_linear(options):
    """The same of the buffers that XLA plans."""
    sizes = []
    for seqlen in (1 << 14, 1 << 16):
        compiled = jax.jit(functools.partial(gradients, options)).lower(*operands(seqlen)).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[1] <= 4.5 * sizes[0]


def test_the_dense_program_would_fail():
    """The measure itself: jax.nn's quadratic program does not pass."""

    def dense(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, implementation="xla")

    small, large = (
        largest_array(jax.make_jaxpr(dense)(*operands(n)[:3]).jaxpr) for n in (1 << 14, 1 << 16)
    )
    assert large > 4.5 * small
