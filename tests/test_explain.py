"""jax_fa3.explain: every attention call of a program, what runs it and why."""

import functools

import jax
import numpy as np
import pytest

import jax_fa3
from jax_fa3 import dot_product_attention, explain, route

HALF = jax.ShapeDtypeStruct((2, 16, 4, 64), "bfloat16")
FULL = jax.ShapeDtypeStruct((2, 16, 4, 64), "float32")


@jax.jit
def layer(x):
    return x + dot_product_attention(x, x, x, is_causal=True)


def model(x):
    x, _ = jax.lax.scan(lambda x, _: (layer(x), None), x, None, length=3)
    return dot_product_attention(x, x, x, key_value_seq_lengths=np.array([3, 16]), scale=0.5)


def test_every_call_of_a_program_each_time():
    """Traced or not before, under jit, in a scan and differentiated."""
    loss = jax.jit(jax.grad(lambda x: model(x).astype("float32").sum()))
    loss.trace(FULL)
    for _ in range(2):
        first, second = explain(loss, FULL)
        assert first.arguments == (
            "query=float32[2,16,4,64], key=float32[2,16,4,64], value=float32[2,16,4,64], "
            "is_causal=True"
        )
        assert second.arguments.endswith("scale=0.5, key_value_seq_lengths=int32[2]")
        assert first.where == f"{__file__}:{layer.__wrapped__.__code__.co_firstlineno + 2}"
        assert {x.reason for x in (first, second)} == {
            "the kernels take bfloat16 or float16, not float32"
        }
        assert str(first).endswith(f"is_causal=True: runs {first.runs}: {first.reason}")


def test_what_runs(monkeypatch):
    def only(call, x=HALF):
        (found,) = explain(call, x)
        return found.runs, found.reason

    def call(x, **options):
        return dot_product_attention(x, x, x, **options)

    forced = functools.partial(call, implementation="xla")
    assert only(forced) == ("its XLA implementation", "implementation is 'xla'")
    monkeypatch.setattr(route, "device_reason", lambda: None)
    assert only(call) == ("the Hopper kernels", None)
    mixed = functools.partial(call, forward_dtype="float8_e4m3fn", mask=np.ones((16, 16), bool))
    runs, reason = only(mixed)
    assert runs == "its forward pass in the dtype of its inputs" and "no dense mask" in reason
    monkeypatch.setattr(route, "device_reason", lambda: "there is no GPU")
    assert only(call) == ("its XLA implementation", "there is no GPU")


def test_other_entries():
    ends = np.array([0, 3, 16], np.int32)
    varlen = functools.partial(jax_fa3.flash_attention_varlen, cu_seqlens_q=ends)
    (call,) = explain(lambda x: varlen(x, x, x), jax.ShapeDtypeStruct((16, 4, 64), "bfloat16"))
    assert call.where.startswith(__file__)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P(None, "x")
    ring = functools.partial(jax_fa3.ring_attention, axis_name="x", is_causal=True)
    ring = jax.shard_map(ring, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    assert "query=bfloat16[2,8,4,64]" in explain(lambda x: ring(x, x, x), HALF)[0].arguments
    assert explain(lambda x: x, HALF) == ()


def test_caches():
    """An append of its own, and an attention that appends: one call each."""
    cache, tables = np.zeros((2, 64, 4, 64), "float32"), np.zeros((64, 16), np.float32)
    rotary = jax_fa3.Rotary(tables, tables)

    def step(x):
        lengths = np.array([3, 16])
        cached = jax_fa3.append_to_cache(cache, cache, x, x, cache_lengths=lengths, rotary=rotary)
        return jax_fa3.cached_attention(x, *cached, x, x, cache_lengths=lengths + 16)

    append, attention = explain(step, FULL)
    arrays = "key_cache=float32[2,64,4,64], value_cache=float32[2,64,4,64], key=float32[2,16,4,64]"
    assert append.arguments == (
        f"{arrays}, value=float32[2,16,4,64], cache_lengths=int32[2], "
        "rotary=Rotary(cos=float32[64,16], sin=float32[64,16], interleaved=False)"
    )
    assert attention.arguments.startswith(f"query=float32[2,16,4,64], {arrays}")
    assert append.where != attention.where and append.where.startswith(__file__)
    for call in append, attention:
        assert call.runs == "its XLA implementation"
        assert "caches of bfloat16 or float16, not float32" in call.reason


def test_an_error_leaves_nothing_behind():
    with pytest.raises(ValueError, match="query has 1 dimensions"):
        explain(lambda x: dot_product_attention(x, x, x), np.zeros(3, np.float32))
    assert route.listener.get() is None
