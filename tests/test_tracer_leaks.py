"""Calls and gradients under jax_check_tracer_leaks, which raises where a trace outlives its use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa3
from jax_fa3.flax import make_attention_fn

LENGTHS = np.array([3, 8], "int32")
attend = jax_fa3.dot_product_attention
CALLS = {
    "lengths and offsets": functools.partial(
        attend,
        is_causal=True,
        query_seq_lengths=LENGTHS,
        key_value_seq_lengths=LENGTHS,
        query_offset=LENGTHS,
    ),
    "bias and mask": lambda q, k, v: attend(q, k, v, q[0].swapaxes(0, 1), q[0, :, 0] > 0),
    "documents": functools.partial(
        attend,
        query_segment_ids=np.ones((2, 6), "int32"),
        key_value_segment_ids=np.ones((2, 8), "int32"),
    ),
    "scores": functools.partial(
        attend,
        sinks=np.ones(4, "float32"),
        alibi_slopes=np.ones(4, "float32"),
        logits_soft_cap=2.0,
        return_max_logits=True,
    ),
    "float8 forward": functools.partial(
        attend, forward_dtype="float8_e4m3fn", key_value_seq_lengths=LENGTHS
    ),
    "mapped": lambda *x: jax.vmap(attend)(*(y[None] for y in x)),
    "Flax": lambda q, k, v: make_attention_fn(padding_mask=True)(
        q, k, v, mask=jnp.arange(8)[None, None, None] < LENGTHS[:, None, None, None]
    ),
}


def normal(seqlen, heads):
    x = np.random.default_rng(0).standard_normal((2, seqlen, heads, 8))
    return jnp.asarray(x, "bfloat16")


@pytest.fixture(scope="module", autouse=True)
def nothing_traced():
    """What was traced before would not be traced again."""
    jax.clear_caches()


def trace_gradient(call, *x):
    def total(*x):
        return sum(jnp.sum(y.astype(jnp.float32)) for y in jax.tree.leaves(call(*x)))

    with jax.checking_leaks():
        jax.jit(jax.grad(total, range(len(x)))).trace(*x)


def test_calls():
    x = normal(6, 4), normal(8, 2), normal(8, 2)
    trace_gradient(lambda *x: {name: call(*x) for name, call in CALLS.items()}, *x)


def test_varlen():
    ends = np.array([0, 2, 6], "int32")
    call = functools.partial(jax_fa3.flash_attention_varlen, cu_seqlens_q=ends)
    trace_gradient(lambda x: call(x, x, x), normal(6, 4)[0])


def test_divided_sequence():
    mesh = jax.make_mesh((2,), ("sp",), axis_types=(jax.sharding.AxisType.Auto,))
    call = functools.partial(
        jax_fa3.ring_attention, axis_name="sp", is_causal=True, key_value_seq_lengths=LENGTHS
    )
    spec = jax.P(None, "sp")
    call = jax.shard_map(call, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    trace_gradient(call, normal(8, 4), normal(8, 2), normal(8, 2))


def test_explicit_axes():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        place = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, jax.P("x")))
        x = normal(6, 4), normal(8, 2), normal(8, 2)
        trace_gradient(CALLS["lengths and offsets"], *map(place, x))


def test_a_leak_is_found():
    leaked = []

    def call(x):
        leaked.append(2 * x)
        return x

    with pytest.raises(Exception, match="[Ll]eaked"):
        trace_gradient(call, normal(6, 4))
