"""The XLA implementation needs memory linear in the sequence length, forward and backward, and the
kernels half as much as the results of a long call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import h200
from jax_fa3 import dot_product_attention, native, xla

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


@pytest.mark.skipif(native.module() is None, reason="there are no plans")
def test_gradients_of_16k_tokens_on_an_h200():
    """Temporaries: `out`, 64 MiB, the LSE, and a workspace for a quarter of the heads, 33 MiB."""
    mesh = Mesh(np.array(h200.devices(1)), ("x",))
    x = jax.ShapeDtypeStruct((1, 1 << 14, 16, 128), "bfloat16", sharding=NamedSharding(mesh, P()))

    def gradients(query, key, value, dout):
        call = functools.partial(dot_product_attention, is_causal=True)
        return jax.vjp(call, query, key, value)[1](dout)

    memory = jax.jit(gradients).trace(x, x, x, x).lower().compile().memory_analysis()
    of_counters = 1 << 12
    assert memory.temp_size_in_bytes <= (98 << 20) + of_counters


def test_gradient_of_a_bias_is_made_in_place():
    """No buffer beside the gradient itself has its size; of bfloat16 XLA for CPUs makes float32."""

    def loss(bias, *x):
        return dot_product_attention(*x, bias, implementation="xla").sum()

    seqlen = 1 << 13
    x = jax.ShapeDtypeStruct((1, seqlen, 1, 8), "float32")
    bias = jax.ShapeDtypeStruct((seqlen, seqlen), "float32")
    memory = jax.jit(jax.grad(loss)).lower(bias, x, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * seqlen * seqlen


def test_a_call_of_few_scores_has_no_loop(monkeypatch, scores_at_once):
    """Up to 2^24 scores; above, blocks."""
    monkeypatch.setattr(xla, "SCORES_AT_ONCE", scores_at_once)

    def loops(seqlen):
        return [
            equation.primitive.name
            for sub in subjaxprs(
                jax.make_jaxpr(functools.partial(gradients, {}))(*operands(seqlen)).jaxpr
            )
            for equation in sub.eqns
        ].count("scan")

    assert (loops(1 << 12), loops((1 << 12) + 8)) == (0, 2)


def test_the_dense_program_would_fail():
    """The measure itself: jax.nn's quadratic program does not pass."""

    def dense(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, implementation="xla")

    small, large = (
        largest_array(jax.make_jaxpr(dense)(*operands(n)[:3]).jaxpr) for n in (1 << 14, 1 << 16)
    )
    assert large > 4.5 * small
