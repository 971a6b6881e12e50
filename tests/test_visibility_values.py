"""What arrays that say which keys a row sees turn out to hold at run time: numbers that int32 does
not have, documents that break their rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_fa3
import visibility
from jax_fa3 import dot_product_attention
from meshes import both_kinds, mesh_of, place, run

FAR = (1 << 32) + 2  # 2 where its upper half is cut off
SEQLEN = 20
RNG = np.random.default_rng(3)
X = [RNG.standard_normal((2, SEQLEN, 2, 32), np.float32) for _ in range(3)]
IDS = np.repeat([[1, 2], [3, 4]], 10, axis=1)


def rows_of(value):
    return np.full((2, SEQLEN), value)


# ---- int64, which a program may have under jax_enable_x64

FAR_VALUES = [  # (far values, int32 values of the same meaning)
    (dict(kv_end=rows_of(FAR)), dict(kv_end=rows_of(SEQLEN))),
    (dict(kv_end=rows_of(-FAR)), dict(kv_end=rows_of(0))),
    (dict(kv_start=rows_of(-FAR)), dict(kv_start=rows_of(0))),
    (dict(kv_start=rows_of(FAR)), dict(kv_start=rows_of(SEQLEN))),
    (dict(query_seq_lengths=np.array([FAR, 3])), dict(query_seq_lengths=np.array([SEQLEN, 3]))),
    (dict(key_value_seq_lengths=np.array([FAR, 3])), dict(key_value_seq_lengths=[SEQLEN, 3])),
    (dict(query_offset=np.array([FAR, -FAR])), dict(query_offset=np.array([99, -99]))),
]


@pytest.mark.parametrize(
    ("far", "near"), FAR_VALUES, ids=[f"{n}{i}" for i, (x, _) in enumerate(FAR_VALUES) for n in x]
)
def test_traced_numbers_beyond_int32_keep_their_meaning(far, near):
    attend = functools.partial(dot_product_attention, *X, is_causal=True, return_residual=True)
    with jax.enable_x64(True):
        got = jax.jit(lambda told: attend(**told))(far)
    near = {name: np.asarray(x, np.int32) for name, x in near.items()}
    for x, y in zip(got, attend(**near), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["query_segment_ids", "key_value_segment_ids"])
def test_traced_ids_beyond_int32_break_their_rule(name):
    """Those of the first sequence fit."""
    told = dict(query_segment_ids=IDS)
    told |= {name: np.where(IDS == 4, FAR, IDS)}
    with jax.enable_x64(True):
        out = jax.jit(lambda told: dot_product_attention(*X, **told))(told)
    assert not np.isnan(out[0]).any() and np.isnan(out[1]).all()


@pytest.mark.parametrize("kind", visibility.KINDS)
def test_a_table_is_int32_in_a_program_of_64_bits(kind):
    seqlen_q, seqlen_k, sources = visibility.random_problem(np.random.default_rng(1), kind)
    arrays = {name: x for name, x in sources.items() if isinstance(x, np.ndarray)}
    static = {name: x for name, x in sources.items() if name not in arrays}
    static |= dict(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    with jax.enable_x64(True):
        made = jax.jit(lambda arrays: jax_fa3.make_visibility(**arrays, **static))(arrays)
    assert made.table.dtype == jnp.int32
    np.testing.assert_array_equal(made.table, visibility.model(seqlen_q, seqlen_k, **sources))


# ---- documents

LEGAL = np.array([0, 12, 20, 20], np.int32)
BROKEN = [[0, 12, 9, 20], [-1, 12, 20, 20], [0, 12, 20, 21]]


@pytest.mark.parametrize("is_self", [True, False])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_traced_documents_that_break_their_rule_give_nan(implementation, is_self):
    """In every row of the output and the log-sum-exp, and in the gradients."""

    @jax.jit
    def results(cu_seqlens_q, cu_seqlens_k, *x):
        def attend(*x):
            return jax_fa3.flash_attention_varlen(
                *x,
                cu_seqlens_q,
                None if is_self else cu_seqlens_k,
                causal=True,
                window_size=(6, -1),
                return_residual=True,
                implementation=implementation,
            )

        outputs, vjp = jax.vjp(attend, *x)
        return *outputs, *vjp(jax.tree.map(jnp.ones_like, outputs))

    x = [a[0].astype("bfloat16") for a in X]
    for got in results(LEGAL, LEGAL, *x):
        assert np.isfinite(np.asarray(got, np.float32)).all()
    for broken in np.array(BROKEN, np.int32):
        for told in [(broken, LEGAL), (LEGAL, broken)][: 1 if is_self else 2]:
            for got in results(*told, *x):
                assert np.isnan(np.asarray(got, np.float32)).all()


def test_documents_of_a_batch_break_their_rule_one_by_one():
    ends = np.array([[0, 12, 20], [0, 12, 9]], np.int32)
    make = functools.partial(jax_fa3.make_visibility, seqlen_q=SEQLEN)

    def call(ends):
        return dot_product_attention(*X, visibility=make(cu_seqlens_q=ends))

    def mapped(ends):
        tables = jax.vmap(lambda x: make(cu_seqlens_q=x))(ends)
        tables = jax.tree.map(lambda x: x[:, 0], tables)
        return dot_product_attention(*X, visibility=tables)

    for out in (jax.jit(call)(ends), jax.jit(mapped)(ends)):
        assert not np.isnan(out[0]).any() and np.isnan(out[1]).all()


@both_kinds
def test_documents_on_a_mesh_break_their_rule_one_by_one(kind):
    mesh = mesh_of(kind, data=2, model=2)
    ends = np.array([[0, 12, 20], [0, 12, 9]], np.int32)

    def call(ends, *x):
        table = jax_fa3.make_visibility(cu_seqlens_q=ends, seqlen_q=SEQLEN)
        return dot_product_attention(*x, visibility=table)

    heads = P("data", None, "model")
    with jax.set_mesh(mesh):
        out = run(call, *place(mesh, (ends, *X), (P("data"), heads, heads, heads)))
    out = np.asarray(out)
    assert not np.isnan(out[0]).any() and np.isnan(out[1]).all()


def test_one_array_for_rows_and_keys_means_the_rows_alone():
    """Ids in any order, where two arrays would have to rise."""
    ids = jnp.asarray([[3, 3, 1, 1, 2, 0]], jnp.int32)
    query = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))

    def attend(ids, of_keys=None):
        words = dict(query_segment_ids=ids, key_value_segment_ids=of_keys)
        return jax_fa3.dot_product_attention(query, query, query, **words)

    def both(ids):
        return attend(ids, ids)

    want = attend(ids)
    for got in (
        both(ids),
        both(np.asarray(ids)),
        jax.jit(both)(ids),
        jax.jit(jax.vmap(both))(ids[None])[0],
        jax_fa3.dot_product_attention(
            query, query, query, visibility=jax_fa3.make_visibility(ids, ids)
        ),
    ):
        np.testing.assert_array_equal(got, want)
