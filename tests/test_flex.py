"""flex_attention against the oracle: the library, what stands beside functions, and block masks."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerance
from flex import (
    BATCH,
    HEADS,
    KEYS,
    ROWS,
    Functions,
    Meaning,
    attend,
    bucket_of,
    compare,
    expected,
    grid,
    inputs,
    library,
    random,
    results,
    tables,
)
from jax_fa3 import create_block_mask, dot_product_attention, flex, flex_attention, xla

LIBRARY, TABLES = library(), tables()
DTYPES = ("bfloat16", "float16", "float32")


@pytest.fixture
def small_blocks(monkeypatch):
    """Four key blocks, the last one filled up."""
    monkeypatch.setattr(xla, "SCORES_PER_BLOCK", 0)
    monkeypatch.setattr(xla, "MIN_BLOCK", 16)
    monkeypatch.setattr(xla, "MAX_BLOCK", 16)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("name", LIBRARY)
def test_library(name):
    functions = LIBRARY[name]
    arrays = inputs(DTYPES[list(LIBRARY).index(name) % 3])
    compare(results(attend(functions), *arrays), arrays, functions.meaning)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_in_blocks(dtype, small_blocks):
    functions, arrays = LIBRARY["any"], inputs(dtype)
    compare(results(attend(functions), *arrays), arrays, functions.meaning)


@pytest.mark.parametrize("name", TABLES)
def test_tables_and_their_gradients(name, small_blocks):
    function, shape, bias = TABLES[name]
    arrays, table = inputs("float32"), random(shape, 7)

    def call(query, key, value, table):
        return attend(Functions(function(table), flex.causal_mask))(query, key, value)

    *got, dtable = results(call, *arrays, table)
    _, _, i, j = grid()
    meaning = Meaning(i >= j, dict(bias=bias(table.astype("float64"))))
    dbias = compare(got, arrays, meaning).dbias
    # The gradient of each number is the sum over the pairs that it is added to.
    numbers = bias(np.arange(table.size).reshape(shape))
    want = np.bincount(
        np.broadcast_to(numbers, dbias.shape).ravel(), dbias.ravel(), table.size
    ).reshape(shape)
    tolerance.check("dtable", dtable, want, want)


def test_t5_buckets_by_counting():
    distances = np.arange(-200, 200)
    for words in (
        dict(num_buckets=32, bidirectional=True, max_distance=128),
        dict(num_buckets=32, bidirectional=False, max_distance=128),
        dict(num_buckets=8, bidirectional=False, max_distance=40),
    ):
        got = flex.t5_bucket(distances, **words)
        want = [bucket_of(d, *words.values()) for d in distances.tolist()]
        np.testing.assert_array_equal(got, want)


def test_slopes_and_gradients_of_captured_arrays_of_16_bits():
    """A nonlinear use of two captured arrays, one of them in a dictionary."""
    arrays, slope = inputs("float32"), random((HEADS,), 8)
    shift = random((BATCH, KEYS), 9, "bfloat16")

    def function(score, b, h, q, k, shift, others):
        return score * jnp.exp(others["slope"][h]) + jnp.sin(shift[b, k].astype(float))

    def call(query, key, value, slope, shift):
        captured = (shift, {"slope": slope})
        return flex_attention(query, key, value, function, captured=captured, return_residual=True)

    *got, dslope, dshift = results(call, *arrays, slope, shift)
    factor = np.exp(slope.astype("float64"))[:, None, None]
    bias = np.sin(shift.astype("float64"))[:, None, None]

    def change(scores):
        return scores * factor + bias, np.broadcast_to(factor, scores.shape)

    compare(got, arrays, Meaning(words=dict(change=change)))
    # dslope by what scaling the rows of a head does to query's gradient: sum of dquery . query.
    head = (np.asarray(got[2]).astype("float64") * arrays[0]).sum((0, 1, 3))
    tolerance.check("dslope", dslope, head, head)
    # A bias of [B, 1, 1, S] has the gradient of all that is added to the scores of a key.
    of_bias = Meaning(words=dict(bias=bias))
    query = (arrays[0].astype("float64") * factor[:, 0]).astype("float64")
    dbias = expected((query, *arrays[1:]), of_bias, "exact").dbias
    want = dbias[:, 0, 0] * np.cos(shift.astype("float64"))
    assert dshift.dtype == shift.dtype
    tolerance.check("dshift", dshift, want, want.astype("bfloat16"))


def test_beside_everything_that_hides_keys():
    """Lengths, offsets, a window, ids and intervals; what padding holds reaches nothing."""
    functions = LIBRARY["and, or"]
    query, key, value, dout, dlse = inputs("bfloat16")
    lengths_q, lengths_k = np.array([33, 40], "int32"), np.array([56, 31], "int32")
    offset = np.array([-3, 11], "int32")
    ids_q = np.repeat([[1, 2, 0]], BATCH, 0).repeat([13, 20, 7], 1).astype("int32")
    ids_k = np.repeat([[1, 2, 0]], BATCH, 0).repeat([30, 20, 6], 1).astype("int32")
    starts = np.random.default_rng(1).integers(0, 9, (BATCH, HEADS, ROWS)).astype("int32")
    b, n, i, j = grid()
    sees = functions.meaning.sees & (j <= i + offset[b] + 20) & (j >= i + offset[b] - 25)
    sees = sees & (ids_q[b, i] == ids_k[b, j]) & (ids_q[b, i] != 0) & (j >= starts[b, n, i])
    sees = sees & (i < lengths_q[b]) & (j < lengths_k[b])
    used_q = (np.arange(ROWS) < lengths_q[:, None]) & (ids_q != 0)
    used_k = (np.arange(KEYS) < lengths_k[:, None]) & (ids_k != 0)
    query, dout = (np.where(used_q[..., None, None], x, np.nan) for x in (query, dout))
    key, value = (np.where(used_k[..., None, None], x, np.nan) for x in (key, value))
    arrays = tuple(x.astype("bfloat16") for x in (query, key, value, dout)) + (dlse,)
    call = attend(
        Functions(flex.generate_tanh_softcap(2.0), functions.mask_mod),
        local_window_size=(25, 20),
        query_offset=offset,
        query_seq_lengths=lengths_q,
        key_value_seq_lengths=lengths_k,
        query_segment_ids=ids_q,
        key_value_segment_ids=ids_k,
        kv_start=starts,
    )
    meaning = Meaning(sees, dict(softcap=2.0))
    got = results(call, *arrays)
    compare(got, arrays, meaning, query_used=used_q, key_used=used_k)
    assert (~sees.any(-1)).any() and np.isneginf(got[1]).any()  # rows that see nothing


def test_scores_that_the_function_hides_or_makes_nan_of():
    """-inf of a score function is a mask; slopes that are NaN where a pair is hidden reach
    nothing."""
    arrays = inputs("float32")

    def function(score, b, h, q, k):
        root = jnp.sqrt(score + jnp.where(q > k, 50.0, -50.0))
        return jnp.where(q == 3, -jnp.inf, root)

    def change(scores):
        _, _, i, j = grid()
        root = np.sqrt(scores + np.where(i > j, 50.0, np.inf))
        return root, 0.5 / root

    _, _, i, j = grid()
    meaning = Meaning((i > j) & (i != 3), dict(change=change))
    got = results(attend(Functions(function, lambda b, h, q, k: q > k)), *arrays)
    compare(got, arrays, meaning)
    assert np.isneginf(np.asarray(got[1])[:, 3]).all() and not np.asarray(got[0])[:, 3].any()


@pytest.mark.parametrize("is_added", (True, False))
def test_what_is_said_of_padding_rows_reaches_no_gradient(is_added):
    arrays, lengths = inputs("float32"), np.array([ROWS // 2, ROWS - 3], np.int32)[:BATCH]

    def gradients(of_padding):
        used = np.arange(ROWS) < lengths[:, None]
        factors = jnp.asarray(np.where(used, 0.5, of_padding), jnp.float32)

        def score_mod(score, b, h, q, k, x):
            return score + x[b, q] if is_added else score * x[b, q]

        def loss(query, key, value):
            call = flex_attention(
                query, key, value, score_mod, captured=(factors,), query_seq_lengths=lengths
            )
            return jnp.sum(call**2)

        return jax.grad(loss, (0, 1, 2))(*arrays[:3])

    for got, want in zip(gradients(np.nan), gradients(0.5), strict=True):
        np.testing.assert_array_equal(got, want)


def test_keys_that_fill_a_block_up_are_not_asked_for(small_blocks):
    """An index behind the last key would make NaN, in the gradient of a captured factor too."""
    query, key, value, dout, dlse = inputs("float32")

    def function(score, b, h, q, k, factor, table):
        return score + factor * table.at[k].get(mode="fill", fill_value=jnp.nan)

    def call(*x):
        *qkv, factor, table = x
        return flex_attention(*qkv, function, captured=(factor, table), return_residual=True)

    table = random((KEYS,), 8)
    assert KEYS % xla.MIN_BLOCK
    *got, dfactor, dtable = results(call, query, key, value, dout, dlse, np.float32(0.5), table)
    meaning = Meaning(words=dict(bias=0.5 * table.astype("float64")[None, None, None]))
    want = compare(got, (query, key, value, dout, dlse), meaning).dbias[0, 0, 0]
    tolerance.check("dtable", dtable, 0.5 * want, 0.5 * want)
    np.testing.assert_allclose(dfactor, (want * table).sum(), atol=1e-3)


def test_float16_gradients_where_the_slope_is_large():
    """dS would not fit float16; the gradients do."""
    query, key, value, dout, dlse = inputs("float16")
    arrays = (query / 512).astype("float16"), (key / 64).astype("float16"), value, dout, dlse

    def change(scores):
        return scores * 2.0**14, np.full_like(scores, 2.0**14)

    call = attend(Functions(lambda score, b, h, q, k: score * 2.0**14))
    got = results(call, *arrays)
    assert np.abs(np.asarray(got[4], "float32")).max() < 200
    compare(got, arrays, Meaning(words=dict(change=change)))


def test_inputs_of_three_dimensions_and_no_functions():
    arrays = [x[0] for x in inputs("float32")]
    functions = LIBRARY["softcap"]
    got = results(attend(functions), *arrays)
    batched = results(attend(functions), *(x[None] for x in arrays))
    for x, y in zip(got, batched, strict=True):
        np.testing.assert_array_equal(x, y[0])
    plain = flex_attention(*arrays[:3], is_causal=True)
    np.testing.assert_array_equal(plain, dot_product_attention(*arrays[:3], is_causal=True))


# ---- Block masks


def dense_states(sees, rows, keys):
    """Of [B, N, T, S], by looping."""
    height, width = -(-sees.shape[2] // rows), -(-sees.shape[3] // keys)
    states = np.zeros((*sees.shape[:2], height, width), "uint8")
    for i in range(height):
        for j in range(width):
            block = sees[:, :, i * rows : (i + 1) * rows, j * keys : (j + 1) * keys]
            states[:, :, i, j] = block.any((2, 3)) + 2 * block.all((2, 3))
    return states


@pytest.mark.parametrize(
    ("name", "batch", "heads", "block"),
    [
        ("window", None, None, 8),
        ("documents", BATCH, None, (16, 8)),
        ("and, or", BATCH, HEADS, (7, 13)),
        ("causal", None, HEADS, 128),
    ],
)
def test_block_mask(name, batch, heads, block, small_blocks):
    functions = LIBRARY[name]
    made = create_block_mask(functions.mask_mod, batch, heads, ROWS, KEYS, block_size=block)
    sees = np.broadcast_to(functions.meaning.sees, (batch or 1, heads or 1, ROWS, KEYS))
    want = dense_states(sees, *np.broadcast_to(block, 2).tolist())
    np.testing.assert_array_equal(made.states, want)
    arrays = inputs("bfloat16")
    compare(results(attend(functions, block_mask=made), *arrays), arrays, functions.meaning)


def test_whole_blocks_decide_alone():
    """What happens where a block mask is of another function."""
    made = create_block_mask(flex.causal_mask, None, None, ROWS, KEYS, block_size=8)
    _, _, i, j = grid()
    whole = i // 8 != j // 8
    sees = np.where(whole, i >= j, (i + j) % 2 == 0)
    functions = Functions(mask_mod=lambda b, h, q, k: (q + k) % 2 == 0)
    arrays = inputs("float32")
    compare(results(attend(functions, block_mask=made), *arrays), arrays, Meaning(sees))


def test_block_mask_is_a_pytree_for_jit_vmap_and_scan():
    query, key, value, *_ = inputs("float32")
    ids = np.random.default_rng(2).integers(0, 2, (3, KEYS))

    def made_of(ids):
        mask = flex.generate_doc_mask_mod(ids)
        return create_block_mask(mask, None, None, ROWS, KEYS, block_size=8)

    def call(query, ids, blocks):
        functions = Functions(mask_mod=flex.generate_doc_mask_mod(ids))
        return attend(functions, block_mask=blocks)(query, key, value)[0]

    many = jnp.stack([query, query + 1, query - 1])
    blocks = jax.jit(jax.vmap(made_of))(ids)
    assert blocks.states.shape == (3, 1, 1, 5, 7)
    got = jax.jit(jax.vmap(call))(many, ids, blocks)
    _, scanned = jax.lax.scan(lambda c, x: (c, call(*x)), 0, (many, ids, blocks))
    for i in range(3):
        want = call(many[i], ids[i], made_of(ids[i]))
        np.testing.assert_allclose(got[i], want, atol=1e-5)
        np.testing.assert_allclose(scanned[i], want, atol=1e-5)


def test_block_mask_never_has_all_pairs():
    """No array of making one is as large as the pairs of one row of blocks of one head."""

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (x.aval.size for x in equation.outvars)
            for x in equation.params.values():
                inner = getattr(x, "jaxpr", x)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    made = jax.make_jaxpr(
        lambda: create_block_mask(lambda b, h, q, k: q >= k + b + h, 3, 5, 512, 768).states
    )()
    assert 128 * 768 <= max(sizes(made.jaxpr)) < 2 * 128 * 768


def test_examples_of_the_docs():
    """Each program of docs/flex.md runs; the last one's mask is what it says."""
    page = pathlib.Path(__file__).parents[1] / "docs/flex.md"
    names = {}
    for program in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(program, names)
    i, j = np.ogrid[:256, :256]
    prefix = np.array([16, 100])[:, None, None, None]
    sees = ((j < prefix) | (i >= j)) & (abs(i - j) < 128)
    x = names["q"], names["k"], names["v"]
    want = dot_product_attention(*x, mask=sees, logits_soft_cap=30.0, implementation="xla")
    np.testing.assert_array_equal(names["out"], want)
    assert names["dtable"].shape == (32, 4) and np.abs(names["dtable"]).max() > 0
