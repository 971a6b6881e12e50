"""Programs of typed users, for mypy alone: right ones are accepted and wrong ones rejected.

A wrong line carries the code of its error. An ignore that hides nothing is an error itself
(warn_unused_ignores), so that a wrong program which mypy accepts fails `make lint`.
"""

from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3
import jax_fa3.flax
from jax_fa3.float8.rounding import QuantizedQKV, Saturated

q = k = v = jnp.ones((2, 128, 4, 64), jnp.bfloat16)
lengths = np.array([100, 128], np.int32)
Results = jax.Array | tuple[jax.Array, ...]


def one_call(flag: bool) -> None:
    attend = jax_fa3.dot_product_attention
    pair = tuple[jax.Array, jax.Array]
    assert_type(attend(q, k, v), jax.Array)
    assert_type(attend(q, k, v, None, None, is_causal=True, scale=0.1), jax.Array)
    assert_type(attend(q, k, v, key_value_seq_lengths=lengths, query_offset=3), jax.Array)
    assert_type(attend(q, k, v, return_residual=True), pair)
    assert_type(attend(q, k, v, return_residual=flag), Results)
    assert_type(attend(q, k, v, return_residual=True, return_max_logits=True), Results)
    attend(q, k, v, local_window_size=(1, 2), forward_dtype="float8_e4m3fn")
    attend(q, k, v, local_window_size=(1, 2, 3))  # type: ignore[arg-type]
    attend(q, k, v, implementation="cudnn")  # type: ignore[call-overload]
    attend(q, k, v, sequence_parallel="rings")  # type: ignore[call-overload]
    attend(q, k, v, is_casual=True)  # type: ignore[call-overload]
    attend(q, k)  # type: ignore[call-overload]


def questions(x: jax.ShapeDtypeStruct) -> None:
    assert_type(jax_fa3.is_supported(x, x, x, bias=x, is_causal=True), str | None)
    assert_type(jax_fa3.explain(one_call, True), tuple[jax_fa3.ExplainedCall, ...])
    jax_fa3.is_supported(x, x)  # type: ignore[call-arg]


def packed(ids: jax.Array, ends: jax.Array, flag: bool) -> None:
    assert_type(jax_fa3.make_visibility(ids), jax_fa3.Visibility)
    attend = jax_fa3.flash_attention_varlen
    assert_type(attend(q[0], k[0], v[0], ends, causal=True), jax.Array)
    assert_type(attend(q[0], k[0], v[0], ends, return_residual=flag), Results)
    pair = tuple[jax.Array, jax.Array]
    assert_type(attend(q[0], k[0], v[0], ends, return_residual=True), pair)
    attend(q[0], k[0], v[0], ends, is_causal=True)  # type: ignore[call-overload]


def cached(flag: bool) -> None:
    attend, more = jax_fa3.cached_attention, jax_fa3.Rotary(jnp.ones((9, 8)), jnp.ones((9, 8)))
    three = tuple[jax.Array, jax.Array, jax.Array]
    four = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    assert_type(attend(q, k, v, cache_lengths=lengths, rotary=more), jax.Array)
    pair = tuple[jax.Array, jax.Array]
    assert_type(attend(q, k, v, cache_lengths=lengths, return_residual=True), pair)
    assert_type(attend(q, k, v, k, v, cache_lengths=lengths), three)
    assert_type(attend(q, k, v, k, v, cache_lengths=lengths, return_residual=True), four)
    attend(q, k, v, k, v, cache_lengths=lengths, return_residual=flag)
    attend(q, k, v)  # type: ignore[call-overload]
    assert_type(jax_fa3.combine(q, q[..., 0], axis=0), pair)


def divided(flag: bool) -> None:
    for attend in (jax_fa3.ring_attention, jax_fa3.ulysses_attention):
        assert_type(attend(q, k, v, axis_name="seq"), jax.Array)
        pair = tuple[jax.Array, jax.Array]
        assert_type(attend(q, k, v, axis_name="seq", return_residual=True), pair)
        assert_type(attend(q, k, v, axis_name=("a", "b"), return_residual=flag), Results)
        attend(q, k, v)  # type: ignore[call-overload]


def float8(flag: bool) -> None:
    both = tuple[QuantizedQKV, Saturated]
    assert_type(jax_fa3.quantize_qkv(q, k, v), jax_fa3.QuantizedQKV)
    assert_type(jax_fa3.quantize_qkv(q, k, v, return_saturated=True), both)
    assert_type(jax_fa3.quantize_qkv(q, k, v, return_saturated=flag), QuantizedQKV | both)
    jax_fa3.quantize_qkv(q, k, v, granularity="row")  # type: ignore[call-overload]


def flax() -> None:
    assert_type(jax_fa3.flax.make_attention_fn(is_causal=True)(q, k, v), jax.Array)
    jax_fa3.flax.make_attention_fn(causal=True)  # type: ignore[call-arg]
