"""The oracle and the tolerance rule themselves: right answers pass, wrong ones do not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerance
from cases import CASES, SCORES, Case
from contract import IN_FLOAT32
from jax_fa3.reference import Reference

CASE = Case(
    batch=2,
    seqlen_q=40,
    seqlen_k=50,
    heads_q=4,
    heads_kv=2,
    head_dim=24,
    dtype="float32",
    causal=True,
    window=(12, 3),
    offset=(-6, 9),
    query_lengths=(40, 31),
    key_lengths=(50, 22),
    scale=0.3,
)


def plain_attention(query, key, value, sees, scale):
    """Softmax attention in four lines, for JAX to differentiate; every row must see a key."""
    key, value = (jnp.repeat(x, query.shape[2] // key.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * scale
    scores = jnp.where(sees, scores, -jnp.inf)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
    return out, jax.nn.logsumexp(scores, axis=-1).swapaxes(1, 2)


def test_oracle_is_the_derivative_of_attention():
    case = Case(
        batch=2,
        seqlen_q=30,
        seqlen_k=40,
        heads_q=6,
        heads_kv=2,
        head_dim=16,
        dtype="float32",
        causal=True,
        window=(9, 4),
        offset=3,
        scale=0.7,
    )
    query, key, value, dout, dlse = case.inputs()
    with jax.enable_x64(True):
        operands = [jnp.asarray(x, jnp.float64) for x in (query, key, value)]
        (out, lse), vjp = jax.vjp(
            lambda *x: plain_attention(*x, case.sees, case.softmax_scale), *operands
        )
        expected = (
            out,
            lse,
            *vjp((jnp.asarray(dout, jnp.float64), jnp.asarray(dlse, jnp.float64))),
        )
    for (name, got), want in zip(case.reference(case.inputs()).items(), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12, err_msg=name)


def test_oracle_runs_on_jax_arrays():
    with jax.enable_x64(True):
        inputs = [jnp.asarray(x) for x in CASE.inputs()]
        on_jax = CASE.reference(inputs, xp=jnp)
    for (name, got), (_, want) in zip(
        on_jax.items(), CASE.reference(CASE.inputs()).items(), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("case", [*CASES[: -len(SCORES) : 4], *SCORES], ids=lambda case: case.name)
def test_oracle_agrees_with_the_documented_reference(case):
    """jax_fa3.reference, written by itself from the same documentation."""
    query, key, value, dout, dlse = case.inputs()
    not_theirs = ("deterministic", "return_max_logits")
    options = {k: v for k, v in case.options.items() if k not in not_theirs}
    theirs = Reference(query, key, value, **options, **case.index_arrays, **case.head_arrays)
    gradients = theirs.gradients(dout, dlse)
    expected = [theirs.out, theirs.lse, gradients.query, gradients.key, gradients.value]
    expected += [gradients.sinks[None]] if case.sinks else []
    expected += [theirs.max_logits] if case.max_logits else []
    for (name, got), want in zip(case.reference(case.inputs()).items(), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_same_precision_reference_passes_the_rule(dtype):
    for case in CASES[::5]:
        case = dataclasses.replace(case, dtype=dtype)
        inputs = case.inputs()
        same = case.reference(inputs, dtype)
        for (name, exact), (_, s) in zip(case.reference(inputs).items(), same.items(), strict=True):
            tolerance.check(name, s.astype("float32" if name in IN_FLOAT32 else dtype), exact, s)


WRONG = {
    "scale": dict(scale=0.32),
    "not causal": dict(causal=False, window=(12, 12)),
    "window one wider on the left": dict(window=(13, 3)),
    "causal one too far": dict(causal=False, window=(12, 1)),
    "offset of the other sequence": dict(offset=(9, -6)),
    "bottom-right alignment": dict(offset=(4, 19)),
    "one key too many": dict(key_lengths=(50, 23)),
    "one row too few": dict(query_lengths=(39, 31)),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("wrong", WRONG)
def test_rule_rejects_wrong_semantics(wrong, dtype):
    case = dataclasses.replace(CASE, dtype=dtype)
    inputs = case.inputs()
    exact, same = case.reference(inputs), case.reference(inputs, dtype)
    got = dataclasses.replace(case, **WRONG[wrong]).reference(inputs)
    rejected = set()
    for (name, result), (_, x), (_, s) in zip(
        got.items(), exact.items(), same.items(), strict=True
    ):
        try:
            tolerance.check(name, result.astype("float32" if name == "lse" else dtype), x, s)
        except AssertionError:
            rejected.add(name)
    assert {"out", "lse", "dquery", "dkey"} <= rejected, rejected


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, np.nan, x),
        lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, np.inf, x),
        lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, x + 1, x),
        lambda x: x * 1.03,
        lambda x: x[::-1],
        lambda x: x[:, :-1],
    ],
    ids=[
        "one NaN",
        "one inf",
        "one wrong element",
        "3% too large",
        "batch reversed",
        "row missing",
    ],
)
def test_rule_rejects_wrong_values(spoil):
    case = dataclasses.replace(CASE, dtype="bfloat16")
    inputs = case.inputs()
    exact, same = case.reference(inputs), case.reference(inputs, "bfloat16")
    for name in ("out", "dquery", "dkey", "dvalue"):
        got = spoil(getattr(same, name)).astype("bfloat16")
        with pytest.raises(AssertionError, match=name):
            tolerance.check(name, got, getattr(exact, name), getattr(same, name))


def test_rule_demands_minus_infinity_where_the_oracle_has_it():
    exact = np.array([1.0, -np.inf])
    tolerance.check("lse", exact.astype(np.float32), exact, exact)
    for wrong in (-1e30, np.inf, np.nan):
        with pytest.raises(AssertionError, match="lse"):
            tolerance.check("lse", np.array([1.0, wrong], np.float32), exact, exact)
