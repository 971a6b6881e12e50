"""Where jax.nn.dot_product_attention defines the meaning, the results are its results.

Compared in float32 on every argument that both have.  Not compared, because ours is documented to
differ: rows that see no key (jax.nn averages all values there), the LSE's dtype, and the LSE's
gradient (jax.nn stops it).
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa3 import dot_product_attention

BATCH, SEQLEN_Q, SEQLEN_K, HEADS_Q, HEADS_KV, HEAD_DIM = 2, 33, 40, 6, 3, 16
LOGITS = (BATCH, HEADS_Q, SEQLEN_Q, SEQLEN_K)
RNG = np.random.default_rng(0)
QUERY, DOUT = RNG.standard_normal((2, BATCH, SEQLEN_Q, HEADS_Q, HEAD_DIM)).astype(np.float32)
KEY, VALUE = RNG.standard_normal((2, BATCH, SEQLEN_K, HEADS_KV, HEAD_DIM)).astype(np.float32)
BIAS = RNG.standard_normal(LOGITS).astype(np.float32)
MASK = RNG.random(LOGITS) < 0.7
MASK[..., 0] = True  # every row sees a key
LENGTHS = dict(
    query_seq_lengths=np.array([33, 9], np.int32),
    key_value_seq_lengths=np.array([17, 40], np.int32),
)

CALLS = {
    "plain": {},
    "scale": dict(scale=0.7),
    "negative scale": dict(scale=-0.7),
    "causal": dict(is_causal=True),
    "window": dict(local_window_size=(6, 9)),
    "window of one int": dict(local_window_size=8),
    "causal window": dict(is_causal=True, local_window_size=(6, 9)),
    "query lengths": dict(query_seq_lengths=LENGTHS["query_seq_lengths"]),
    "key lengths": dict(key_value_seq_lengths=LENGTHS["key_value_seq_lengths"]),
    "lengths": LENGTHS,
    "causal with lengths": dict(is_causal=True) | LENGTHS,
    "mask": dict(mask=MASK),
    "mask of one head": dict(mask=MASK[:, :1]),
    "mask of one batch": dict(mask=MASK[:1]),
    "mask of one row": dict(mask=MASK[:, :, :1]),
    "padding mask": dict(mask=MASK[:, :1, :1]),
    "3-D mask": dict(mask=MASK[0]),
    "bias": dict(bias=BIAS),
    "bias of one head": dict(bias=BIAS[:, :1]),
    "bias of one batch": dict(bias=BIAS[:1]),
    "bias and mask": dict(bias=BIAS, mask=MASK),
    "everything": dict(bias=BIAS, mask=MASK, is_causal=True, scale=0.3, local_window_size=(40, 5))
    | LENGTHS,
}


def both(options):
    """(ours, theirs) as functions of query, key, value and the array options."""
    ours = functools.partial(dot_product_attention, implementation="xla", **options)
    theirs = functools.partial(jax.nn.dot_product_attention, implementation="xla", **options)
    return ours, theirs


def valid_rows(options):
    """[B, Sq, 1, 1]: rows before their length; beyond, jax.nn's gradients and LSE are arbitrary."""
    lengths = options.get("query_seq_lengths", np.full(BATCH, SEQLEN_Q))
    return (np.arange(SEQLEN_Q) < lengths[:, None])[..., None, None]


def near(ours, theirs, name):
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_output_and_residual(options):
    ours, theirs = (
        jax.jit(functools.partial(function, return_residual=True))(QUERY, KEY, VALUE)
        for function in both(options)
    )
    near(ours[0], theirs[0], "out")
    rows = valid_rows(options)[..., 0]
    near(np.where(rows, ours[1], 0), np.where(rows, theirs[1], 0), "lse")


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_gradients(options):
    def loss(function, query, key, value, bias):
        more = options | ({} if bias is None else {"bias": bias})
        return jnp.vdot(function(query, key, value, implementation="xla", **more), DOUT)

    bias = options.get("bias")
    argnums = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, function), argnums=argnums))(
            QUERY, KEY, VALUE, bias
        )
        for function in (dot_product_attention, jax.nn.dot_product_attention)
    )
    for name, mine, other in zip(("query", "key", "value", "bias"), ours, theirs, strict=False):
        near(mine, other, name)


def test_three_dimensions():
    for function_options in ({}, dict(is_causal=True), dict(bias=BIAS[0]), dict(mask=MASK[:1])):
        ours, theirs = both(function_options)
        near(ours(QUERY[0], KEY[0], VALUE[0]), theirs(QUERY[0], KEY[0], VALUE[0]), "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_agrees_to_its_own_precision(dtype):
    x = [a.astype(dtype) for a in (QUERY, KEY, VALUE)]
    ours, theirs = (np.asarray(f(*x), np.float32) for f in both(dict(is_causal=True)))
    np.testing.assert_allclose(ours, theirs, atol=0.03 if dtype == "bfloat16" else 0.004)
    assert dot_product_attention(*x).dtype == dtype


def test_signature_extends_theirs():
    """Same names, order, kinds and defaults; ours adds keyword-only parameters at the end."""
    ours, theirs = (
        list(inspect.signature(f).parameters.values())
        for f in (dot_product_attention, jax.nn.dot_product_attention)
    )
    shared = [p for p in ours if p.name in {q.name for q in theirs}]
    assert [(p.name, p.kind, p.default) for p in shared] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    added = ours[len(shared) :]
    assert {p.name for p in added} == {
        "query_offset",
        "deterministic",
        "sequence_parallel",
        "sm_margin",
        "forward_dtype",
        "query_descale",
        "key_descale",
        "value_descale",
        "value_is_prepared",
        "query_segment_ids",
        "key_value_segment_ids",
        "kv_start",
        "kv_end",
        "attention_chunk",
        "visibility",
        "sinks",
        "alibi_slopes",
        "logits_soft_cap",
        "return_max_logits",
    }
    assert all(p.kind is p.KEYWORD_ONLY and p.default in (None, "auto", 0) for p in added)


def test_second_derivative_of_the_xla_implementation():
    """The gradient of a function of the gradient, as through jax.nn."""

    def squared_gradient(function, query):
        def loss(query):
            return jnp.vdot(function(query, KEY, VALUE, is_causal=True, implementation="xla"), DOUT)

        return jnp.sum(jax.grad(loss)(query) ** 2)

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(squared_gradient, function)))(QUERY)
        for function in (dot_product_attention, jax.nn.dot_product_attention)
    )
    near(ours, theirs, "second derivative")
