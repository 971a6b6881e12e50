"""What calls over caches refuse, by the argument's name, and flash-attn's words for them."""

import dataclasses
import inspect
from dataclasses import MISSING

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa3
from jax_fa3 import append_to_cache, cached_attention, flash_attention_with_kvcache
from jax_fa3.cached.arguments import CachedArguments
from meshes import compiled_for

B, T, N, K, H, P, S, M = 2, 3, 4, 2, 32, 9, 8, 4


def zeros(*shape, dtype="bfloat16"):
    return jnp.zeros(shape, dtype)


CACHE, NEW = zeros(P, S, K, H), zeros(B, T, K, H)
LENGTHS, TABLES = np.zeros(B, np.int32), np.zeros((B, M), np.int32)
TABLE = zeros(50, 8, dtype="float32")
GOOD = dict(
    query=zeros(B, T, N, H),
    key_cache=CACHE,
    value_cache=CACHE,
    key=NEW,
    value=NEW,
    cache_lengths=LENGTHS,
    block_tables=TABLES,
)
NO_KEY = dict(key=None, value=None)
RAGGED = dict(query_starts=np.zeros(B + 1, np.int32), query=zeros(7, N, H), **NO_KEY)

WRONG = [
    (dict(query=None), TypeError, "query is None; expected an array"),
    (dict(layout="psh"), ValueError, "layout is 'psh'; expected one of"),
    (dict(key_cache=None), TypeError, "key_cache is None; expected an array"),
    (dict(value_cache=None), TypeError, "value_cache is None; expected .*layout='fused'"),
    (dict(layout="fused"), ValueError, "value_cache is given and layout is 'fused'"),
    (dict(layout="fused", value_cache=None, key_cache=zeros(P, S, 3, H)), ValueError, "an even"),
    (dict(key_cache=zeros(P, S, H)), ValueError, r"key_cache has 3 dimensions, .*pages, slots"),
    (dict(key_cache=zeros(P, S, K, H, dtype="int8")), TypeError, "key_cache has dtype int8"),
    (dict(value_cache=zeros(P, S, K, H, dtype="float16")), TypeError, "value_cache has dtype"),
    (dict(value_cache=zeros(P, S, 1, H)), ValueError, "value_cache has heads = 1, .*expected 2"),
    (dict(key_cache=zeros(P, 0, K, H)), ValueError, "key_cache has slots = 0"),
    (dict(query=zeros(B, N, H)), ValueError, r"query has 3 dimensions.*\(batch, rows, heads"),
    (dict(RAGGED, query=GOOD["query"]), ValueError, r"query has 4 dimensions.*\(tokens, heads"),
    (dict(query=zeros(B, T, N, H, dtype="float32")), TypeError, "query has dtype float32"),
    (dict(query=zeros(B, T, N, 16)), ValueError, "query has head_dim = 16.*expected 32"),
    (dict(query=zeros(B, T, 3, H)), ValueError, "query has 3 heads; expected a multiple of .* 2"),
    (dict(value=None), ValueError, "value is None and key is given; expected both"),
    (dict(key=None), ValueError, "key is None and value is given; expected both"),
    (dict(key=zeros(B, 2, K, H)), ValueError, r"key has shape \(2, 2, 2, 32\); expected"),
    (dict(value=zeros(B, T, K, H, dtype="float16")), TypeError, "value has dtype float16"),
    (dict(cache_lengths=None), TypeError, "cache_lengths is None; expected an array"),
    (dict(cache_lengths=LENGTHS[:1]), ValueError, r"cache_lengths has shape \(1,\); .*one per"),
    (dict(cache_lengths=LENGTHS * 1.0), TypeError, "cache_lengths has dtype float64"),
    (dict(cache_lengths=np.full(B, 2**40)), ValueError, "cache_lengths has a value 1099511627776"),
    (dict(block_tables=TABLES[0]), ValueError, "block_tables has shape .*pages of a sequence"),
    (dict(block_tables=TABLES[:, :0]), ValueError, r"block_tables has shape \(2, 0\); expected"),
    (dict(block_tables=None), ValueError, "key_cache has 9 sequences.*expected 2 like query"),
    (dict(RAGGED, query_starts=np.zeros((2, 2), int)), ValueError, "query_starts has shape"),
    (dict(RAGGED, block_tables=None), ValueError, "expected 2 like query_starts, or block_tables"),
    (dict(NO_KEY, new_lengths=LENGTHS), ValueError, "new_lengths is given and key is None"),
    (dict(new_lengths=TABLES), ValueError, r"new_lengths has shape \(2, 4\); expected \(2,\)"),
    (dict(key_starts=1.5), TypeError, "key_starts has dtype"),
    (dict(query_offset=2**29), ValueError, "query_offset is 536870912"),
    (dict(query_offset=TABLES), ValueError, "query_offset has shape"),
    (dict(block_tables=np.zeros((B, 2**25), np.int32)), ValueError, "room for 268435456 keys"),
    (dict(rotary=(TABLE, TABLE)), TypeError, "rotary is a tuple; expected jax_fa3.Rotary"),
    (dict(rotary=jax_fa3.Rotary(TABLE, TABLE[1:])), ValueError, "rotary.sin has shape"),
    (dict(rotary=jax_fa3.Rotary(*[TABLE[:, :3]] * 2)), ValueError, "multiple of 16, at most"),
    (dict(rotary=jax_fa3.Rotary(TABLE, TABLE, 1)), TypeError, "rotary.interleaved is 1"),
    (dict(scale=float("nan")), ValueError, "scale is nan"),
    (dict(is_causal=None), TypeError, "is_causal is None"),
    (dict(local_window_size=(1, -1)), ValueError, "local_window_size is"),
    (dict(local_window_size=(None, 2)), TypeError, r"local_window_size is \(None, 2\); expected"),
    (dict(local_window_size=(2, "a")), TypeError, r"local_window_size is \(2, 'a'\); expected"),
    (dict(return_residual=1), TypeError, "return_residual is 1"),
    (dict(out_dtype="float16"), ValueError, "out_dtype is 'float16'; expected None or bfloat16 or"),
    (dict(implementation="cuda"), ValueError, "implementation is 'cuda'"),
    (dict(sm_margin=132), ValueError, "sm_margin is 132"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=lambda x: str(x)[:40])
def test_cached_attention(change, error, message):
    given = GOOD | change
    with pytest.raises(error, match=message):
        cached_attention(**given)


@pytest.mark.parametrize("function", (cached_attention, append_to_cache))
def test_signatures_have_the_records_names_and_defaults(function):
    record = {field.name: field.default for field in dataclasses.fields(CachedArguments)}
    for name, parameter in inspect.signature(function).parameters.items():
        assert name in record
        wanted = {parameter.empty, parameter.default if record[name] is MISSING else record[name]}
        assert parameter.default in wanted
    if function is cached_attention:
        assert list(record) == list(inspect.signature(function).parameters)


APPEND = {name: x for name, x in GOOD.items() if name != "query"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (NO_KEY, TypeError, "key is None; expected an array"),
        (
            dict(key=zeros(B, T, 3, H)),
            ValueError,
            r"key has shape \(2, 3, 3, 32\); .*\(batch, rows",
        ),
        (dict(query=GOOD["query"]), ValueError, "query is given and rotary is None"),
        (dict(implementation="fa3"), NotImplementedError, "implementation is 'fa3'"),
    ],
)
def test_append_to_cache(change, error, message):
    with pytest.raises(error, match=message):
        append_to_cache(**APPEND | change)


def test_append_takes_one_pair_of_rotary_tables():
    def run(table, cache):
        given = APPEND | dict(key_cache=cache, value_cache=cache)
        return append_to_cache(**given, rotary=jax_fa3.Rotary(table, table))

    with pytest.raises(ValueError, match="rotary is mapped by jax.vmap; expected one pair"):
        jax.vmap(run)(zeros(3, 50, 8, dtype="float32"), jnp.stack([CACHE] * 3))


# ---- flash_attention_with_kvcache


def inputs(rows, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, rows, N, H), (P, S, K, H), (P, S, K, H), (B, rows, K, H), (B, rows, K, H))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def check_equal(pair, *arrays):
    """That `pair` gives two equal results."""
    got, want = compiled_for(pair, *arrays)(*arrays)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def rotary_tables():
    angles = np.random.default_rng(1).uniform(-3, 3, (S * M, 8))
    return np.cos(angles), np.sin(angles)


def test_flash_words_and_defaults():
    """Not causal, interleaved, bottom-right windows; results in flash-attn's order."""
    cos, sin = rotary_tables()
    tables, lengths, starts = np.arange(8).reshape(B, M), np.array([5, 9]), np.array([1, 0])

    def pair(*x):
        got = flash_attention_with_kvcache(
            *x, rotary_cos=cos, rotary_sin=sin, page_table=tables, cache_seqlens=lengths,
            causal=True, window_size=(4, -1), softmax_scale=0.3, return_softmax_lse=True,
            cache_leftpad=starts,
        )  # fmt: skip
        want = cached_attention(
            *x, rotary=jax_fa3.Rotary(cos, sin, interleaved=True), block_tables=tables,
            cache_lengths=lengths, local_window_size=(4, 100), scale=0.3, return_residual=True,
            key_starts=starts,
        )  # fmt: skip
        return got, want

    check_equal(pair, *inputs(2))


def test_flash_turns_all_rows_alike_where_order_has_no_say():
    """Neither causal nor a window: every query row stands at the first one's position, where
    `cached_attention` has that one too."""
    cos, sin = rotary_tables()
    index = np.array([5, 2])

    def pair(q, *x):
        given = dict(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=False, cache_seqlens=4)
        given |= dict(cache_batch_idx=index)
        out, *caches = flash_attention_with_kvcache(q, *x, **given)
        swapped, *_ = flash_attention_with_kvcache(q[:, ::-1], *x, **given)
        first, *wanted = cached_attention(
            q, *x, cache_lengths=np.array([4, 4]), is_causal=False, block_tables=index[:, None],
            rotary=jax_fa3.Rotary(cos, sin),
        )  # fmt: skip
        return (out, out[:, 0], caches), (swapped[:, ::-1], first[:, 0], wanted)

    check_equal(pair, *inputs(2))


def test_flash_over_the_whole_cache():
    def pair(q, keys, values):
        got = flash_attention_with_kvcache(q, keys[:B], values[:B])
        return got, jax_fa3.dot_product_attention(q, keys[:B], values[:B])

    check_equal(pair, *inputs(1)[:3])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=np.zeros((2, 3, 4))), ValueError, r"q is \(2, 3, 4\); expected an array of 4"),
        (dict(causal=1), TypeError, "causal is 1; expected a Python bool"),
        (dict(window_size=(-2, 0)), ValueError, r"window_size is \(-2, 0\)"),
        (dict(cache_batch_idx=LENGTHS, page_table=TABLES), ValueError, "expected one of them"),
        (
            dict(page_table=TABLES[0]),
            ValueError,
            r"page_table has shape \(\d+,\); expected",
        ),
        (dict(cache_batch_idx=TABLES), ValueError, r"cache_batch_idx has shape \(2, 4\)"),
        (dict(cache_seqlens=1.5), TypeError, "cache_seqlens is 1.5; expected an int or"),
        (dict(rotary_cos=TABLE), ValueError, "one of rotary_cos and rotary_sin is None"),
        (dict(rotary_cos=TABLE, rotary_sin=TABLE), ValueError, "rotary_cos is given and k is None"),
        (dict(softmax_scale="1"), TypeError, "softmax_scale is '1'"),
    ],
)
def test_flash_refuses(change, error, message):
    q, k_cache, v_cache, *_ = inputs(1)
    with pytest.raises(error, match=message):
        flash_attention_with_kvcache(**dict(q=q, k_cache=k_cache, v_cache=v_cache) | change)
