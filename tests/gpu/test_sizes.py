"""Arrays of more than 2^31 elements, compared with the oracle on sampled parts.

A 32-bit index that wraps gives finite, repeatable, wrong numbers, so the samples stand on both
sides of every power of two that an element or byte offset crosses.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contract
import oracle
from cases import Case
from jax_fa3 import dot_product_attention
from oracle import Results

# Tens of GiB each: one worker runs them all, with pytest -n N --dist loadgroup.
one_at_a_time = pytest.mark.xdist_group("memory")


def gradients(case, query, key, value, dout, dlse):
    """Results of one call, kept on the device."""

    @jax.jit
    def run(query, key, value, dout, dlse):
        (out, lse), vjp = jax.vjp(
            lambda *x: dot_product_attention(
                *x, return_residual=True, implementation="fa3", **case.options
            ),
            query,
            key,
            value,
        )
        return dict(Results(out, lse, *vjp((dout, dlse))).items())

    return run(query, key, value, dout, dlse)


def all_finite(results):
    return all(bool(jnp.isfinite(result).all()) for result in results.values())


@one_at_a_time
def test_many_sequences():
    """query, out and dquery above 2^31 elements; batch above 65535."""
    case = Case(batch=70_000, seqlen_q=128, seqlen_k=64, heads_q=4, heads_kv=1, head_dim=64)
    assert case.batch * case.seqlen_q * case.heads_q * case.head_dim > 1 << 31
    periods = (97, 89, 83, 79, 73)  # sequences repeat, their combinations do not
    some = dataclasses.replace(case, batch=max(periods)).inputs()
    parts = [x[:period] for x, period in zip(some, periods, strict=True)]
    inputs = [jnp.asarray(part)[jnp.arange(case.batch) % len(part)] for part in parts]
    results = gradients(case, *inputs)
    assert all_finite(results)

    per_sequence = case.seqlen_q * case.heads_q * case.head_dim
    wraps = [(1 << power) // per_sequence for power in range(28, 33)]
    sampled = sorted(
        {
            b
            for wrap in [0, 1 << 16, case.batch - 1, *wraps]
            for b in (wrap - 1, wrap, wrap + 1)
            if 0 <= b < case.batch
        }
    )
    part = dataclasses.replace(case, batch=len(sampled))
    pick = np.array(sampled)
    contract.compare(
        part,
        [p[pick % len(p)] for p in parts],
        Results(**{name: np.asarray(x[pick]) for name, x in results.items()}),
    )


@one_at_a_time
def test_many_keys():
    """key, value, dkey and dvalue above 2^31 elements, of which a window at the end is used."""
    case = Case(
        batch=1,
        seqlen_q=64,
        seqlen_k=1_100_000,
        heads_q=8,
        heads_kv=8,
        head_dim=256,
        causal=True,
        window=(900, 0),
        offset=1_099_936,
    )
    assert case.seqlen_k * case.heads_kv * case.head_dim > 1 << 31
    tail = 1024  # keys that the oracle is given
    start = case.seqlen_k - tail
    part = dataclasses.replace(case, seqlen_k=tail, offset=case.offset - start)
    query, key, value, dout, dlse = part.inputs()

    def unused_then(x):
        """NaN-free filler in front of the keys that are used."""
        filler = jnp.full((1, start, *x.shape[2:]), 3, x.dtype)
        return jnp.concatenate([filler, x], axis=1)

    results = gradients(case, query, unused_then(key), unused_then(value), dout, dlse)
    assert all_finite(results)
    for name in ("dkey", "dvalue"):
        assert not bool(jnp.any(results[name][:, :start])), f"{name} of unused keys is not zero"
        results[name] = results[name][:, start:]
    contract.compare(
        part, part.inputs(), Results(**{name: np.asarray(x) for name, x in results.items()})
    )


@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_long_sequence(head_dim):
    """2^20 tokens with a window of 129, compared on stretches of rows and keys."""
    seqlen, left = 1 << 20, 128
    case = Case(
        batch=1,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        heads_q=2,
        heads_kv=1,
        head_dim=head_dim,
        causal=True,
        window=(left, 0),
    )
    period = 4099
    some = dataclasses.replace(case, seqlen_q=period, seqlen_k=period).inputs()
    places = np.arange(seqlen) % period
    results = gradients(case, *(jnp.asarray(x)[:, places] for x in some))
    assert all_finite(results)
    rows, keys = 320, 320 + left
    for first in (left, 1 << 16, (1 << 19) - 7, seqlen - rows):
        part = dataclasses.replace(case, seqlen_q=rows, seqlen_k=keys, offset=left)
        at_rows, at_keys = places[first : first + rows], places[first - left : first + rows]
        inputs = [x[:, at_keys if i in (1, 2) else at_rows] for i, x in enumerate(some)]
        whole = slice(left, rows)  # keys whose every row is in the stretch
        exact, same = part.reference(inputs), part.reference(inputs, case.dtype)
        got = {
            name: np.asarray(
                x[:, first : first + rows]
                if name in ("out", "lse", "dquery")
                else x[:, first - left : first + rows]
            )
            for name, x in results.items()
        }
        for (name, x), (_, s) in zip(exact.items(), same.items(), strict=True):
            stretch = whole if name in ("dkey", "dvalue") else slice(None)
            contract.tolerance.check(
                f"{name} at {first}", got[name][:, stretch], x[:, stretch], s[:, stretch]
            )


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, "bfloat16"), (128, "float16"), (256, "bfloat16")]
)
def test_dense_medium_length(head_dim, dtype):
    """4096 tokens, the oracle itself on the GPU in float64."""
    case = Case(
        batch=1,
        seqlen_q=4096,
        seqlen_k=4000,
        heads_q=2,
        heads_kv=1,
        head_dim=head_dim,
        dtype=dtype,
        causal=head_dim != 128,
        offset=-100 if head_dim == 256 else None,
    )
    inputs = case.inputs()
    got = gradients(case, *inputs)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        on_device = [jnp.asarray(x) for x in inputs]
        exact = case.reference(on_device, xp=jnp)
        same = case.reference(on_device, dtype, xp=jnp)
    for (name, x), (_, s) in zip(exact.items(), same.items(), strict=True):
        contract.tolerance.check(name, np.asarray(got[name]), np.asarray(x), np.asarray(s))


@one_at_a_time
def test_many_pairs():
    """bias, dbias and mask above 2^31 elements; some heads are compared, the oracle on the GPU."""
    batch, heads, seqlen, head_dim = 5, 8, 8200, 64
    assert batch * heads * seqlen**2 > 1 << 31
    of_bias, of_mask, of_dlse, *keys = jax.random.split(jax.random.key(0), 7)
    inputs = [jax.random.normal(k, (batch, seqlen, heads, head_dim), jnp.bfloat16) for k in keys]
    inputs.append(jax.random.normal(of_dlse, (batch, seqlen, heads)))
    bias = jax.random.normal(of_bias, (batch, heads, seqlen, seqlen), jnp.bfloat16)
    mask = jax.random.bernoulli(of_mask, shape=bias.shape)

    @jax.jit
    def run(query, key, value, dout, dlse, bias, mask):
        def attend(query, key, value, bias):
            return dot_product_attention(
                query, key, value, bias, mask, return_residual=True, implementation="fa3"
            )

        (out, lse), vjp = jax.vjp(attend, query, key, value, bias)
        return dict(Results(out, lse, *vjp((dout, dlse))).items())

    results = run(*inputs, bias, mask)
    assert all_finite(results)
    everything = np.ones((1, seqlen), bool)
    for b, h in ((0, 0), (3, 6), (3, 7), (batch - 1, heads - 1)):
        one, plane = np.s_[b : b + 1, :, h : h + 1], np.s_[b : b + 1, h : h + 1]
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            exact, same = (
                oracle.attention(
                    *(x[one] for x in inputs),
                    sees=mask[plane],
                    query_used=everything,
                    key_used=everything,
                    scale=head_dim**-0.5,
                    bias=bias[plane],
                    precision=precision,
                    xp=jnp,
                )
                for precision in ("exact", "bfloat16")
            )
        for (name, x), (_, s) in zip(exact.items(), same.items(), strict=True):
            if name not in results:
                continue
            got = results[name][plane if name == "dbias" else one]
            contract.tolerance.check(
                f"{name} of head {h} of {b}", *(np.asarray(y) for y in (got, x, s))
            )


@one_at_a_time
def test_a_million_tokens_of_documents():
    """Both passes in one call, some documents compared; memory as docs/packed.md has it."""
    random = np.random.default_rng(0)
    seqlen, heads, heads_kv, head_dim = 1 << 20, 4, 2, 128
    ends = np.unique(np.cumsum(random.lognormal(7.8, 1, 600).astype(int)).clip(max=seqlen))
    lengths = np.diff(ends, prepend=0)
    assert lengths.sum() == seqlen and len(lengths) > 100
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths).astype(np.int32)[None]
    case = Case(
        batch=1,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        heads_q=heads,
        heads_kv=heads_kv,
        head_dim=head_dim,
        causal=True,
    )
    shapes = [(heads, head_dim), (heads_kv, head_dim), (heads_kv, head_dim), (heads, head_dim)]
    keys = jax.random.split(jax.random.key(0), 5)
    inputs = [
        jax.random.normal(key, (1, seqlen, *shape), jnp.bfloat16)
        for key, shape in zip(keys[:4], shapes, strict=True)
    ]
    inputs.append(jax.random.normal(keys[4], (1, seqlen, heads)))

    def run(query, key, value, dout, dlse, ids):
        (out, lse), vjp = jax.vjp(
            lambda *x: dot_product_attention(
                *x,
                is_causal=True,
                query_segment_ids=ids,
                return_residual=True,
                implementation="fa3",
            ),
            query,
            key,
            value,
        )
        return dict(Results(out, lse, *vjp((dout, dlse))).items())

    compiled = jax.jit(run).lower(*inputs, ids).compile()
    # For a row and head: dQ and the statistics, out and LSE from pass to pass. The table.
    formula = seqlen * (heads * (4 * head_dim + 16 + 4) + 16.5)
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.1 * formula
    results = compiled(*inputs, ids)
    assert all_finite(results)
    short = np.flatnonzero(lengths < 2000)
    for document in (short[0], short[len(short) // 2], short[-1], lengths.argmin()):
        rows = slice(ends[document] - lengths[document], ends[document])
        length = int(lengths[document])
        part = dataclasses.replace(case, seqlen_q=length, seqlen_k=length)
        contract.compare(
            part,
            [np.asarray(x[:, rows]) for x in inputs],
            Results(**{name: np.asarray(x[:, rows]) for name, x in results.items()}),
        )
