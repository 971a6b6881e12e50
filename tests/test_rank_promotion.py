"""Calls and gradients where JAX raises for arrays of unequal ranks, as its own tests do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa3
from jax_fa3.flax import make_attention_fn

LENGTHS = np.array([3, 9], "int32")
CALLS = {
    "plain": {},
    "causal": dict(is_causal=True),
    "lengths": dict(query_seq_lengths=LENGTHS, key_value_seq_lengths=LENGTHS),
    "window": dict(local_window_size=(2, 1), key_value_seq_lengths=LENGTHS),
    "offset": dict(is_causal=True, query_offset=np.array([0, 2], "int32")),
    "one offset": dict(is_causal=True, query_offset=jnp.int32(2)),
    "documents": dict(
        query_segment_ids=np.ones((2, 10), "int32"),
        key_value_segment_ids=np.ones((2, 12), "int32"),
        kv_end=np.full((2, 2, 10), 7, "int32"),
    ),
    "chunks": dict(attention_chunk=4, query_offset=np.array([0, 2], "int32")),
    "bias": dict(bias=np.ones((4, 10, 12), "float32")),
    "mask": dict(mask=np.arange(12) < 5),
    "scores": dict(
        sinks=np.ones(4, "float32"),
        alibi_slopes=np.ones(4, "float32"),
        logits_soft_cap=3.0,
        query_seq_lengths=LENGTHS,
        return_residual=True,
        return_max_logits=True,
    ),
    "residual": dict(return_residual=True, query_seq_lengths=LENGTHS),
    "float8 forward": dict(forward_dtype="float8_e4m3fn", key_value_seq_lengths=LENGTHS),
}


def normal(*shape, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def inputs(dtype, seqlen_k=12):
    return normal(2, 10, 4, 16, dtype=dtype), *[normal(2, seqlen_k, 2, 16, dtype=dtype)] * 2


@pytest.fixture
def raising():
    # What was traced before would not be traced again.
    jax.clear_caches()
    with jax.numpy_rank_promotion("raise"):
        yield


def trace(function, *x):
    """Traces and lowers: what the flags check, without the time to compile."""
    jax.jit(function).lower(*x)


def total(call):
    """The sum of all results of a call."""
    return lambda *x: sum(y.astype(jnp.float32).sum() for y in jax.tree.leaves(call(*x)))


@pytest.mark.parametrize(("dtype", "implementation"), [("bfloat16", None), ("float32", "xla")])
@pytest.mark.parametrize("name", CALLS)
def test_call_and_gradient(raising, name, dtype, implementation):
    if dtype == "float32" and "forward_dtype" in CALLS[name]:
        pytest.skip("forward_dtype takes 16-bit inputs")

    def call(*x):
        return jax_fa3.dot_product_attention(*x, implementation=implementation, **CALLS[name])

    x = inputs(dtype)
    call(*x)
    trace(call, *x)
    trace(jax.grad(total(call), (0, 1, 2)), *x)
    trace(jax.vmap(jax.grad(total(call), (0, 1, 2))), *(y[None] for y in x))


def test_several_key_blocks(raising):
    x = inputs("bfloat16", 2200)
    call = total(lambda *x: jax_fa3.dot_product_attention(*x, key_value_seq_lengths=LENGTHS * 99))
    trace(jax.grad(call, (0, 1, 2)), *x)


def test_unbatched(raising):
    x = [y[0] for y in inputs("bfloat16")]
    call = total(lambda *x: jax_fa3.dot_product_attention(*x, key_value_seq_lengths=LENGTHS[:1]))
    trace(jax.grad(call, (0, 1, 2)), *x)


@pytest.mark.parametrize("granularity", ["tensor", "head", "block"])
@pytest.mark.parametrize("prepare_value", [False, True])
def test_float8_inputs(raising, granularity, prepare_value):
    x = inputs("bfloat16", 140)
    quantized = jax_fa3.quantize_qkv(
        *x,
        granularity=granularity,
        prepare_value=prepare_value,
        query_seq_lengths=LENGTHS,
        key_value_seq_lengths=LENGTHS,
    )
    jax_fa3.dot_product_attention(
        **quantized._asdict(), value_is_prepared=prepare_value, key_value_seq_lengths=LENGTHS
    )
    scales = dict(query_descale=jnp.float32(2), key_descale=jnp.ones((2, 2)))
    x = [y.astype("float8_e4m3fn") for y in x]
    jax_fa3.dot_product_attention(*x, **scales, query_seq_lengths=LENGTHS)


@pytest.mark.parametrize("padding_mask", [False, True])
@pytest.mark.parametrize("seqlen_q", [10, 1])
def test_flax_attention_fn(raising, padding_mask, seqlen_q):
    attention = make_attention_fn(padding_mask=padding_mask, is_causal=True)
    query, key, value = inputs("bfloat16")
    mask = jnp.arange(12)[None, None, None, :] < LENGTHS[:, None, None, None]
    call = total(lambda *x: attention(*x, mask=mask))
    trace(jax.grad(call, (0, 1, 2)), query[:, :seqlen_q], key, value)


@pytest.mark.parametrize(
    ("strategy", "layout"),
    [("allgather", "zigzag"), ("ring", "contiguous"), ("ring", "zigzag"), ("ulysses", "zigzag")],
)
def test_divided_sequence(raising, strategy, layout):
    function = getattr(jax_fa3, f"{strategy}_attention")
    call = functools.partial(function, axis_name="sp", layout=layout, is_causal=True)
    call = functools.partial(call, key_value_seq_lengths=LENGTHS)
    mesh = jax.make_mesh((2,), ("sp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P(None, "sp")
    call = jax.shard_map(call, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    trace(jax.grad(total(call), (0, 1, 2)), *(x[:, :8] for x in inputs("bfloat16")))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_mesh(raising, kind):
    kinds = dict(auto=jax.sharding.AxisType.Auto, explicit=jax.sharding.AxisType.Explicit)
    mesh = jax.make_mesh((2, 2), ("dp", "sp"), axis_types=(kinds[kind],) * 2)
    call = total(lambda *x: jax_fa3.dot_product_attention(*x, is_causal=True, query_offset=LENGTHS))
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, jax.P("dp", "sp"))
        x = [jax.device_put(y, place) for y in inputs("bfloat16")]
        jax.jit(jax.grad(call, (0, 1, 2)))(*x)  # compiled: that is when a mesh divides a call


@pytest.mark.parametrize("is_self", [True, False])
def test_varlen(raising, is_self):
    x = normal(10, 4, 16)
    ends = np.array([0, 3, 10], "int32")
    call = functools.partial(
        jax_fa3.flash_attention_varlen, cu_seqlens_q=ends, causal=True, window_size=(4, -1)
    )
    of_keys = None if is_self else np.array([0, 5, 10], "int32")
    trace(functools.partial(call, cu_seqlens_k=of_keys), x, x, x)
