"""Long calls, whose backward pass takes chunks of heads one after another, in the same workspace.

Each is compared with calls of one key/value head, which are one chunk: a later chunk finds in the
workspace what the one before has left there. dK and dV have equal bits where the forward pass has
one tile for both; at head_dim 128 it takes the tile that fits the number of heads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import bits

import transforms
from jax_fa3 import dot_product_attention, flex, flex_attention, native
from jax_fa3.operands import Extents
from jax_fa3.options import AttentionOptions

RANDOM = np.random.default_rng(0)
# Documents of all lengths; a mask with tiles that are empty, full and neither.
DOCUMENTS = np.sort(RANDOM.integers(0, 40, (1, 65_536)).astype(np.int32))
MASK = np.tril(np.kron(RANDOM.random((64, 64)) < 0.6, np.ones((128, 128), bool)))[None, None]


def inputs(batch, seqlen, heads_q, heads_kv, head_dim=128, dtype="bfloat16"):
    """query, key, value, the cotangents of out and of the log-sum-exp, and sinks."""
    keys = jax.random.split(jax.random.key(seqlen + heads_q), 6)
    query, key, value, dout = (
        jax.random.normal(key, (batch, seqlen, heads, head_dim), dtype)
        for key, heads in zip(keys, (heads_q, heads_kv, heads_kv, heads_q), strict=False)
    )
    dlse = jax.random.normal(keys[4], (batch, seqlen, heads_q), jnp.float32)
    return query, key, value, dout, dlse, jax.random.normal(keys[5], (heads_q,), jnp.float32)


def attend(query, key, value, sinks, **options):
    """out and the log-sum-exp."""
    return dot_product_attention(
        query, key, value, sinks=sinks, return_residual=True, implementation="fa3", **options
    )


def attend_with_a_function(query, key, value, sinks):
    del sinks
    score = flex.generate_tanh_softcap(2.0)
    return flex_attention(query, key, value, score, return_residual=True, implementation="fa3")


def parts(batch, heads_kv, group):
    """Sequence, key/value head and query heads of each call that the whole is compared with."""
    for sequence in range(batch):
        for head in range(heads_kv):
            queries = slice(head * group, (head + 1) * group)
            yield slice(sequence, sequence + 1), slice(head, head + 1), queries


def check(attend, inputs, equal=("dkey", "dvalue")):
    """`equal`: the gradients that have the bits of the parts' calls."""
    query, key, value, dout, dlse, sinks = inputs

    @jax.jit
    def gradients(query, key, value, dout, dlse, sinks):
        return jax.vjp(attend, query, key, value, sinks)[1]((dout, dlse))

    dquery, dkey, dvalue, dsinks = gradients(*inputs)
    batch, heads_kv = key.shape[0], key.shape[2]
    sums = np.zeros(dsinks.shape, np.float32)
    for b, kv, q in parts(batch, heads_kv, query.shape[2] // heads_kv):
        part = gradients(
            query[b, :, q], key[b, :, kv], value[b, :, kv], dout[b, :, q], dlse[b, :, q], sinks[q]
        )
        whole = dict(dquery=dquery[b, :, q], dkey=dkey[b, :, kv], dvalue=dvalue[b, :, kv])
        for got, (name, x) in zip(part, whole.items(), strict=False):
            transforms.assert_near(x, got, relative=3e-3)  # an ulp of bfloat16
            assert name not in equal or bits(got) == bits(x), name
        sums[q] += part[3]
    np.testing.assert_allclose(dsinks, sums, rtol=1e-3, atol=1e-2)


def num_chunks(inputs, arrays=(), **options):
    query, key, value, *_ = inputs
    extents = Extents.of(query, key, value.shape[3])
    options = AttentionOptions(scale=1.0, **options)
    return native.plan("backward", query.dtype.name, extents, options, arrays=arrays)["num_chunks"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(batch=1, seqlen=16_384, heads_q=16, heads_kv=16),
        dict(batch=1, seqlen=16_300, heads_q=9, heads_kv=9),  # of four heads and of five
        dict(batch=1, seqlen=16_384, heads_q=32, heads_kv=8),
        dict(batch=3, seqlen=16_384, heads_q=8, heads_kv=4, dtype="float16"),
        dict(batch=1, seqlen=16_384, heads_q=32, heads_kv=32, head_dim=64),
        dict(batch=1, seqlen=16_384, heads_q=16, heads_kv=16, head_dim=96),
    ],
    ids=str,
)
def test_chunks_are_the_calls_of_their_heads(sizes, causal):
    x = inputs(**sizes)
    assert num_chunks(x, **(dict(window_right=0) if causal else {})) > 1
    one_tile = sizes.get("head_dim", 128) < 128
    check(functools.partial(attend, is_causal=causal), x, ("dkey", "dvalue") if one_tile else ())


def test_chunks_of_sums_on_a_grid():
    """Equal bits of dQ, too: the grid of a row is that of all keys, whichever chunk it is in."""
    x = inputs(1, 16_384, 32, 16, head_dim=64)
    assert num_chunks(x, window_right=0, deterministic=True) > 1
    call = functools.partial(attend, is_causal=True, deterministic=True)
    check(call, x, equal=("dquery", "dkey", "dvalue"))


@pytest.mark.parametrize("sm_margin", [1, 57, 131])
def test_chunks_on_fewer_multiprocessors(sm_margin):
    """The workspace is asked for before anybody knows how many there are."""
    x = inputs(1, 16_384, 8, 8)
    assert num_chunks(x, window_right=0, sm_margin=sm_margin) == 2
    check(functools.partial(attend, is_causal=True, sm_margin=sm_margin), x, equal=())


def test_chunks_of_documents():
    x = inputs(1, 65_536, 16, 16)
    assert num_chunks(x, ["visibility"], window_right=0) == 4
    check(functools.partial(attend, is_causal=True, query_segment_ids=DOCUMENTS), x)


def test_chunks_of_a_mask():
    """Work tiles of which a list leaves none are there as well."""
    x = inputs(8, 8192, 16, 16)
    assert num_chunks(x, ["mask"]) == 2
    check(functools.partial(attend, mask=MASK), x)


def test_chunks_of_a_function():
    check(attend_with_a_function, inputs(1, 16_384, 16, 16))
