"""flex_attention in programs: caches of jit, transforms, meshes, and what its errors say."""

import dataclasses
import functools
import inspect
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa3
from flex import BATCH, HEADS, KEYS, KV_HEADS, ROWS, random
from jax_fa3 import api, create_block_mask, flex, flex_attention, route
from jax_fa3.arguments import Arguments
from jax_fa3.flex.functions import trace
from jax_fa3.flex.public import FlexArguments
from meshes import run

IDS = np.random.default_rng(3).integers(0, 3, (4 * BATCH, KEYS))


def score_mod(score, b, h, q, k, table, ids):
    return score * (1 + 0.1 * h) + table[h, jnp.clip(k - q, -5, 5) + 5] + 0.1 * b


def mask_mod(b, h, q, k, table, ids):
    return (ids[b, q] == ids[b, k]) | (h == 3)


def problem(batch=BATCH):
    """query, key, value, the table and the ids."""
    heads = HEADS, KV_HEADS, KV_HEADS
    shapes = [(batch, n, h, 8) for n, h in zip((ROWS, KEYS, KEYS), heads, strict=True)]
    arrays = [jnp.asarray(random(shape, i)) for i, shape in enumerate(shapes)]
    return *arrays, jnp.asarray(random((HEADS, 11), 3)), jnp.asarray(IDS[:batch])


def attend(query, key, value, table, ids, **options):
    given = dict(captured=(table, ids), return_residual=True, implementation="xla")
    return flex_attention(query, key, value, score_mod, mask_mod, **given | options)


def dense(query, key, value, table, ids):
    """The same by way of a bias and a mask; the factor of a head is in its query."""
    batch = len(query)
    b, h, q, k = jnp.ogrid[:batch, :HEADS, : query.shape[1], : key.shape[1]]
    bias = table[h, jnp.clip(k - q, -5, 5) + 5] + 0.1 * b
    mask = (ids[b, q] == ids[b, k]) | (h == 3)
    query = query * (1 + 0.1 * jnp.arange(HEADS))[:, None]
    options = dict(return_residual=True, implementation="xla")
    return jax_fa3.dot_product_attention(query, key, value, bias, mask, **options)


def total(call, ids, *x):
    out, lse = call(*x, ids)
    return jnp.sin(out).sum() + jnp.cos(jnp.where(jnp.isneginf(lse), 0, lse)).sum()


def gradients(call, *x):
    *x, ids = x
    return jax.grad(functools.partial(total, call, ids), range(len(x)))(*x)


@functools.cache
def expected(batch=BATCH):
    return run(functools.partial(gradients, dense), *problem(batch))


def near(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5 * (1 + np.abs(y).max()))


# ---- What is compiled again


def test_equal_functions_share_a_program():
    """A new function of the same meaning in each call, closing over new arrays, on the same
    program; whatever differs in its meaning has another."""
    query, key, value, table, _ = problem()

    def call(number, table, shift=0):
        def score(score, b, h, q, k):
            return score + table[h, jnp.abs(q - k + shift) % 11] * number

        return flex_attention(query, key, value, score, lambda b, h, q, k: q >= k)

    first = call(0.5, table)
    before = api.fa3_attention._cache_size()
    np.testing.assert_array_equal(first, call(0.5, table))
    near(call(0.5, 2 * table), call(1.0, table))
    assert api.fa3_attention._cache_size() == before + 1  # for the number 1.0
    assert not np.allclose(first, call(0.5, table, shift=1))
    assert api.fa3_attention._cache_size() == before + 2


@pytest.mark.parametrize(
    ("one", "other", "are_equal"),
    [
        (lambda s, b, h, q, k: s + 1.0, lambda score, *_: score + 1.0, True),
        (lambda s, *_: s + 1.0, lambda s, *_: s + 1.0000001, False),
        (lambda s, b, h, q, k: s + q, lambda s, b, h, q, k: s + k, False),
        (lambda s, *_: jnp.where(s > 0, s, 0.0), lambda s, *_: jnp.where(s > 0, 0.0, s), False),
        (lambda s, *_: s.astype("bfloat16") + 0.0, lambda s, *_: s.astype("float16") + 0.0, None),
        (lambda s, *_: jax.nn.relu(s), lambda s, *_: jax.nn.relu(s), None),
        (
            lambda s, b, h, q, k: jax.lax.fori_loop(0, 3, lambda i, x: x + 1.0, s),
            lambda s, b, h, q, k: jax.lax.fori_loop(0, 3, lambda i, x: x + 2.0, s),
            False,
        ),
    ],
    ids=["names", "last bit", "index", "branches", "dtypes", "derivative rule", "loop body"],
)
def test_equality(one, other, are_equal):
    def made(function):
        return trace("score_mod", lambda *x: function(*x).astype("float32"), (), 0)[0]

    assert made(one) == made(one) or are_equal is None
    if are_equal:
        assert made(one) == made(other) and hash(made(one)) == hash(made(other))
    else:
        assert made(one) != made(other)


def custom_rules(slope):
    @jax.custom_jvp
    def same(x):
        return x * 1.0

    same.defjvp(lambda primals, tangents: (same(*primals), slope * tangents[0]))
    return lambda score, b, h, q, k: same(score)


def test_derivative_rules_are_kept_apart():
    """Two functions that differ in their derivative alone."""
    query, key, value, *_ = problem()

    def dquery(slope):
        call = functools.partial(flex_attention, score_mod=custom_rules(slope))
        return jax.grad(lambda query: jnp.sin(call(query, key, value)).sum())(query)

    near(dquery(3.0), 3 * dquery(1.0))


def test_gradients_of_captured_arrays_are_made_where_they_are_asked_for():
    *x, ids = problem()

    def program(*which):
        return str(jax.make_jaxpr(jax.grad(functools.partial(total, attend, ids), which))(*x))

    assert "scatter" in program(0, 3) and "scatter" not in program(0, 1, 2)


# ---- Transforms


def test_vmap_over_some_of_the_arrays():
    query, key, value, table, ids = problem()
    many = jnp.stack([query, 1 - query]), jnp.stack([table, 2 * table]), jnp.stack([ids, ids % 2])
    call = functools.partial(gradients, attend)
    got = run(jax.vmap(call, (0, None, None, 0, 0)), many[0], key, value, *many[1:])
    want = [
        run(functools.partial(gradients, dense), many[0][i], key, value, many[1][i], many[2][i])
        for i in range(2)
    ]
    near(got, [jnp.stack(x) for x in zip(*want, strict=True)])


def test_scan_of_remat():
    def layers(query, key, value, table, ids):
        layer = jax.checkpoint(lambda query, _: (attend(query, key, value, table, ids)[0], None))
        return jax.lax.scan(layer, query, None, length=1)[0], jnp.zeros(())

    def plain(*x):
        return dense(*x)[0], jnp.zeros(())

    near(*(run(functools.partial(gradients, call), *problem()) for call in (layers, plain)))


def test_forward_mode_and_derivatives_of_the_gradient():
    *x, ids = problem()

    def both(call):
        def slope(*x):
            one = functools.partial(total, call, ids)
            return jax.jvp(one, x, x)[1]

        return lambda *x: (slope(*x), jax.grad(slope, 3)(*x))

    near(*(run(both(call), *x) for call in (attend, dense)))


def test_nothing_leaks():
    """Functions that close over tracers, under jit and jax.grad."""
    query, key, value, table, ids = problem()

    def one(query, table, ids):
        def score(score, b, h, q, k):
            return score + table[h, q % 11]

        mask = flex.generate_doc_mask_mod(ids, flex.noop_mask)
        return flex_attention(query, key, value, score, mask).sum()

    jax.clear_caches()
    with jax.checking_leaks():
        inside = jax.jit(jax.grad(one, (0, 1)))(query, table, ids)
        near(jax.grad(one, (0, 1))(query, table, ids), inside)


def test_enable_x64():
    """Indices stay int32 and scores float32."""
    x = [np.asarray(a) for a in problem()]
    want = run(dense, *map(jnp.asarray, x))
    with jax.enable_x64(True):
        near(run(attend, *map(jnp.asarray, x)), want)


# ---- Meshes


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit), ids=str)
def test_indices_are_global_on_a_mesh(kind):
    """Batch and heads split over eight devices, captured arrays in parts too; fewer key heads than
    devices; a function that has a derivative rule of its own and changes nothing."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    split = P("data", None, "model")
    specs = split, P("data"), P("data"), P("model"), P("data")
    blocks = create_block_mask(
        lambda b, h, q, k: mask_mod(b, h, q, k, None, jnp.asarray(IDS)),
        4 * BATCH, HEADS, ROWS, KEYS, block_size=8,
    )  # fmt: skip

    def score(*x):
        return jax.nn.relu(score_mod(*x) + 64) - 64

    def call(*x):
        query, key, value, *captured = x
        return flex_attention(
            query, key, value, score, mask_mod, captured, block_mask=blocks, return_residual=True
        )

    with jax.set_mesh(mesh):
        x = [
            jax.device_put(a, NamedSharding(mesh, spec))
            for a, spec in zip(problem(4 * BATCH), specs, strict=True)
        ]
        compiled = jax.jit(functools.partial(gradients, call)).lower(*x).compile()
        got = compiled(*x)
    near(got, expected(4 * BATCH))
    assert got[0].sharding.spec[:3] == ("data", None, "model")


@pytest.mark.parametrize("check_vma", (True, False))
def test_shard_map(check_vma):
    """Indices are those of the device's arrays; what they miss is captured, or closed over."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4],
                         axis_types=(AxisType.Auto,) * 2)  # fmt: skip
    split = P("data", None, "model")

    def local(query, key, value, table, ids):
        first = jax.lax.axis_index("data") * BATCH // 2
        head = jax.lax.axis_index("model") * HEADS // 2

        def score(score, b, h, q, k, table):
            return score_mod(score, b + first, h + head, q, k, table, None)

        def mask(b, h, q, k, table):
            return mask_mod(b, h + head, q, k, table, ids)

        return flex_attention(
            query, key, value, score, mask, (table,), return_residual=True, implementation="xla"
        )

    call = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, split, split, P(), P("data")),
        out_specs=(split, split),
        check_vma=check_vma,
    )
    near(run(functools.partial(gradients, call), *problem()), expected())


# ---- The choice of what runs, and errors


def test_route(caplog):
    query, key, value, table, ids = (x.astype("bfloat16") for x in problem())
    reason = route.device_reason()
    route.log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, "jax_fa3"):
        call = functools.partial(flex_attention, query, key, value, lambda s, *_: s)
        for _ in range(2):
            call()
    said = [record.getMessage() for record in caplog.records if record.name == "jax_fa3"]
    assert said == [f"flex_attention runs its XLA implementation: {reason}"]
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        call(implementation="fa3")
    (explained,) = jax_fa3.explain(
        lambda *x: flex_attention(*x[:3], score_mod, captured=x[3:]), query, key, value, table, ids
    )
    assert explained.reason == reason
    assert "captured=(bfloat16[4,11], bfloat16[2,56])" in explained.arguments
    assert "score_mod=score_mod" in explained.arguments


def test_signature_is_of_the_record():
    given = {name: x.default for name, x in inspect.signature(flex_attention).parameters.items()}
    known = {field.name: field.default for field in dataclasses.fields(FlexArguments)}
    arrays = dict.fromkeys(("query", "key", "value"), inspect.Parameter.empty)
    assert given == {name: known[name] for name in given} | arrays
    own = known.keys() - {field.name for field in dataclasses.fields(Arguments)}
    assert own == {"score_mod", "mask_mod", "captured", "block_mask"} and own <= given.keys()


BLOCKS = create_block_mask(flex.causal_mask, None, None, 8, 8, block_size=4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(score_mod=3), TypeError, "score_mod is 3; expected a function or None"),
        (
            dict(score_mod=lambda s, *_: s.astype("bfloat16")),
            TypeError,
            r"score_mod returns a scalar of dtype bfloat16; expected one scalar, shape \(\), of "
            "dtype float32",
        ),
        (
            dict(score_mod=lambda s, *_: s + jnp.zeros(3)),
            ValueError,
            r"score_mod returns an array of shape \(3,\)",
        ),
        (dict(score_mod=lambda s, *_: (s, s)), TypeError, "score_mod returns 2 arrays"),
        (dict(mask_mod="causal"), TypeError, "mask_mod is 'causal'; expected a function"),
        (
            dict(mask_mod=lambda b, h, q, k: q - k),
            TypeError,
            "mask_mod returns a scalar of dtype int32; .* of dtype bool",
        ),
        (dict(captured=jnp.zeros(3)), TypeError, "captured is a .*; expected a tuple"),
        (
            dict(captured=("table",), mask_mod=flex.causal_mask),
            TypeError,
            "captured has a str as array 0; expected arrays",
        ),
        (dict(captured=(1.0,)), ValueError, "captured is given and score_mod and mask_mod are"),
        (dict(block_mask=BLOCKS), ValueError, "block_mask is given and mask_mod is None"),
        (
            dict(block_mask=BLOCKS, score_mod=lambda s, *_: s),
            ValueError,
            "block_mask is given and mask_mod is None",
        ),
        (
            dict(block_mask=BLOCKS.states, mask_mod=flex.causal_mask),
            TypeError,
            "block_mask is a .*; expected the result of jax_fa3.create_block_mask",
        ),
        (
            dict(
                block_mask=create_block_mask(flex.causal_mask, None, None, 8, 9),
                mask_mod=flex.causal_mask,
            ),
            ValueError,
            "block_mask is for 8 rows and 9 keys; expected 8 and 8 like query and key",
        ),
        (
            dict(
                block_mask=create_block_mask(flex.causal_mask, 1, 3, 8, 8),
                mask_mod=flex.causal_mask,
            ),
            ValueError,
            r"block_mask has states of shape \(1, 3, 1, 1\); expected \(1 or 2, 1 or 4, 1, 1\)",
        ),
        (
            dict(
                block_mask=create_block_mask(flex.causal_mask, 3, 1, 8, 8),
                mask_mod=flex.causal_mask,
            ),
            ValueError,
            r"block_mask has states of shape \(3, 1, 1, 1\)",
        ),
        (dict(scale="1", mask_mod=flex.causal_mask), TypeError, "scale is '1'"),
        (
            dict(query=jnp.zeros((2, 8, 4, 16), "float8_e4m3fn"), mask_mod=flex.causal_mask),
            TypeError,
            "query has dtype float8_e4m3fn; expected bfloat16, float16 or float32",
        ),
    ],
)
def test_errors(change, error, words):
    x = jnp.zeros((2, 8, 4, 16))
    with pytest.raises(error, match=words):
        flex_attention(**dict(query=x, key=x, value=x) | change)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(q_len=0), ValueError, "q_len is 0; expected at least 1"),
        (dict(batch="2"), TypeError, "batch is '2'; expected an int or None"),
        (dict(block_size=(8, 0)), ValueError, "block_size is 0; expected at least 1"),
        (dict(block_size=(8, 8, 8)), ValueError, "block_size is .*; expected an int or a pair"),
        (dict(mask_mod=None), TypeError, "mask_mod is None; expected a function"),
        (dict(mask_mod=lambda b, h, q, k: 1.0), TypeError, "mask_mod returns a scalar of dtype"),
    ],
)
def test_errors_of_block_masks(change, error, words):
    given = dict(mask_mod=flex.causal_mask, batch=None, num_heads=None, q_len=8, kv_len=8)
    with pytest.raises(error, match=words):
        create_block_mask(**given | change)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: flex.and_masks(flex.causal_mask, 3), TypeError, "mask_mods contains 3; expected"),
        (lambda: flex.generate_sliding_window(-1), ValueError, "window_size is -1; expected at"),
        (lambda: flex.generate_prefix_lm_mask(1.5), TypeError, "prefix_length has dtype float32"),
        (lambda: flex.generate_doc_mask_mod(3), ValueError, "document_ids has 0 dimensions"),
        (lambda: flex.generate_alibi_bias(0), ValueError, "num_heads is 0; expected at least 1"),
        (lambda: flex.generate_tanh_softcap(0.0), ValueError, "soft_cap is 0.0; expected a pos"),
        (lambda: flex.generate_tanh_softcap(None), TypeError, "soft_cap is None; expected a pos"),
        (
            lambda: flex.generate_relative_position_bias(jnp.zeros((4, 6))),
            ValueError,
            r"table has shape \(4, 6\); expected \(heads, 2 R \+ 1\)",
        ),
        (lambda: flex.generate_t5_bias(jnp.zeros(4, int)), TypeError, "table has dtype int32"),
        (lambda: flex.t5_bucket(1, num_buckets=5), ValueError, "num_buckets is 5; expected an"),
        (
            lambda: flex.t5_bucket(1, num_buckets=32, max_distance=8),
            ValueError,
            "max_distance is 8; expected more than 8",
        ),
    ],
)
def test_errors_of_the_library(make, error, words):
    with pytest.raises(error, match=words):
        make()
