"""Wrong segment ids, intervals, chunks and documents: messages name argument, got and expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa3
from jax_fa3 import dot_product_attention

Q, K = (np.zeros(shape, "bfloat16") for shape in ((2, 16, 4, 32), (2, 24, 2, 32)))
CALL = dict(query=Q, key=K, value=K)
SELF = dict(query=Q, key=Q[:, :, :2], value=Q[:, :, :2])
ONES = np.ones((2, 16), np.int32)


def ids_of(*ids):
    """Of two sequences of 16, the first all of one document."""
    row = np.array([*ids, *[0] * (16 - len(ids))], np.int32)
    return np.stack([np.ones(16, np.int32), row])


TABLE = jax_fa3.make_visibility(ONES)
BAD = [  # (the call, what is changed, exception, words of the message)
    (
        CALL,
        dict(query_segment_ids=ONES),
        ValueError,
        ["query_segment_ids", "key_value_", "16", "24"],
    ),
    (
        CALL,
        dict(key_value_segment_ids=np.ones((2, 24), np.int32)),
        ValueError,
        ["query_segment_ids"],
    ),
    (
        SELF,
        dict(query_segment_ids=ONES[:, :8]),
        ValueError,
        ["query_segment_ids", "(2, 8)", "(2, 16)"],
    ),
    (SELF, dict(query_segment_ids=ONES[0]), ValueError, ["query_segment_ids", "(16,)", "(2, 16)"]),
    (
        SELF,
        dict(query_segment_ids=ONES * 1.0),
        TypeError,
        ["query_segment_ids", "float64", "int32"],
    ),
    (SELF, dict(query_segment_ids=ONES.astype("int16")), TypeError, ["int16", "expected int32"]),
    (
        SELF,
        dict(query_segment_ids="ids"),
        TypeError,
        ["query_segment_ids", "str", "expected an array"],
    ),
    (
        SELF,
        dict(query_segment_ids=ONES.astype("int64") + (1 << 40)),
        ValueError,
        ["query_segment_ids", "int32"],
    ),
    (
        CALL,
        dict(query_segment_ids=ONES, key_value_segment_ids=ONES),
        ValueError,
        ["key_value_segment_ids", "(2, 16)", "(2, 24)"],
    ),
    (
        SELF,
        dict(kv_start=np.zeros((2, 3, 16), np.int32)),
        ValueError,
        ["kv_start", "(2, 3, 16)", "(2, 4, 16)", "(2, 2, 16)"],
    ),
    (SELF, dict(kv_end=np.zeros((16,), np.int32)), ValueError, ["kv_end", "(16,)", "(2, 16)"]),
    (SELF, dict(kv_end=[]), ValueError, ["kv_end has shape (0,)", "(2, 16)"]),
    (SELF, dict(query_segment_ids=[[]]), ValueError, ["query_segment_ids", "(1, 0)", "(2, 16)"]),
    (SELF, dict(query_seq_lengths=[]), ValueError, ["query_seq_lengths", "(0,)", "(2,)"]),
    (SELF, dict(kv_end=7), ValueError, ["kv_end", "()", "(2, 16)"]),
    (SELF, dict(attention_chunk=0), ValueError, ["attention_chunk", "0", "at least 1"]),
    (SELF, dict(attention_chunk=1.5), TypeError, ["attention_chunk", "1.5", "int"]),
    (SELF, dict(attention_chunk=True), TypeError, ["attention_chunk", "True", "int"]),
    (SELF, dict(attention_chunk=jnp.int32(4)), TypeError, ["attention_chunk", "int"]),
    (
        SELF,
        dict(visibility=jax.vmap(jax_fa3.make_visibility)(ONES[None])),
        ValueError,
        ["visibility", "(1, 2, 1,", "(batch, heads, words)"],
    ),
    (
        SELF,
        dict(visibility=jax.tree.map(lambda x: x[0], TABLE)),
        ValueError,
        ["visibility", "(1, 76)", "(heads, words) with query of 3 dimensions"],
    ),
    (  # as a tree of parameters is cast
        SELF,
        dict(visibility=jax.tree.map(lambda x: x.astype("bfloat16"), TABLE)),
        TypeError,
        ["visibility.table has dtype bfloat16", "int32"],
    ),
    (
        SELF,
        dict(visibility=jax.tree.map(lambda x: x[..., 1:], TABLE)),
        ValueError,
        ["visibility has a table of shape (2, 1, 75)", "(batch, heads, 76)", "16 query rows"],
    ),
    (
        SELF,
        dict(visibility=jax.tree.map(lambda x: x.ravel()[:76], TABLE)),
        ValueError,
        ["visibility has a table of shape (76,)", "(batch, heads, 76)"],
    ),
    (
        SELF,
        dict(visibility=jax.tree.map(str, TABLE)),
        TypeError,
        ["visibility has a table that is a str", "int32 array"],
    ),
    (SELF, dict(visibility=ONES), TypeError, ["visibility", "ndarray", "make_visibility"]),
    (
        SELF,
        dict(visibility=TABLE, kv_end=ONES),
        ValueError,
        ["visibility", "kv_end", "one of them"],
    ),
    (
        SELF,
        dict(visibility=TABLE, attention_chunk=4),
        ValueError,
        ["visibility", "attention_chunk"],
    ),
    (CALL, dict(visibility=TABLE), ValueError, ["visibility", "16 query rows and 16 keys", "24"]),
    (
        {name: x[:1].repeat(3, 0) for name, x in SELF.items()},
        dict(visibility=TABLE),
        ValueError,
        ["visibility", "batch = 2", "1 or 3"],
    ),
    (
        SELF,
        dict(visibility=jax_fa3.make_visibility(kv_end=np.ones((1, 3, 16), np.int32), seqlen_k=16)),
        ValueError,
        ["visibility", "3 heads", "1, 4 or 2"],
    ),
    (
        SELF,
        dict(query_segment_ids=ids_of(1, 2, 1)),
        ValueError,
        ["query_segment_ids is 1 at position 2 of batch entry 1", "adjacent"],
    ),
    (
        SELF,
        dict(query_segment_ids=ids_of(5, 0, 5)),
        ValueError,
        ["is 5 at position 2 of batch entry 1"],
    ),
    (
        SELF,
        dict(query_segment_ids=ids_of(5, -1)),
        ValueError,
        ["is -1 at position 1 of batch entry 1", "at least 0"],
    ),
    (
        SELF,
        dict(query_segment_ids=ONES, key_value_segment_ids=ids_of(1, 3, 2)),
        ValueError,
        ["key_value_segment_ids is 2 at position 2 of batch entry 1", "do not decrease"],
    ),
    (
        SELF,
        dict(query_segment_ids=ids_of(0, 1, 0, 2), key_value_segment_ids=ONES),
        ValueError,
        ["query_segment_ids is 2 at position 3 of batch entry 1", "zeros"],
    ),
    (
        SELF,
        dict(query_segment_ids=ids_of(1, -2), key_value_segment_ids=ONES),
        ValueError,
        ["query_segment_ids is -2 at position 1", "at least 0"],
    ),
]


@pytest.mark.parametrize(
    ("call", "change", "error", "words"),
    BAD,
    ids=[",".join(x[1]) + str(i) for i, x in enumerate(BAD)],
)
def test_bad_call(call, change, error, words):
    for function in (dot_product_attention, jax_fa3.is_supported):
        with pytest.raises(error) as raised:
            function(**call, **change)
        message = str(raised.value)
        assert all(word in message for word in words) and "expected" in message, message


BAD_TABLES = [
    ({}, ValueError, ["None", "expected", "kv_start"]),
    (dict(kv_end=ONES), ValueError, ["seqlen_k is None", "expected an int"]),
    (dict(cu_seqlens_q=[0, 4]), ValueError, ["seqlen_q is None"]),
    (dict(cu_seqlens_q=[], seqlen_q=4), ValueError, ["cu_seqlens_q has no entries", "plus 1"]),
    (dict(query_segment_ids=[], seqlen_q=4), ValueError, ["query_segment_ids has 0 entries", "4"]),
    (dict(attention_chunk=4, seqlen_q=9), ValueError, ["seqlen_k is None"]),
    (
        dict(query_segment_ids=ONES, seqlen_q=15),
        ValueError,
        ["query_segment_ids has 16", "15", "seqlen_q"],
    ),
    (dict(query_segment_ids=ONES, seqlen_k=15), ValueError, ["query_segment_ids", "16", "15"]),
    (dict(query_segment_ids=ONES, kv_end=ONES[:, 1:]), ValueError, ["kv_end has 15", "16"]),
    (dict(query_segment_ids=ONES, kv_end=ONES[[0] * 3]), ValueError, ["batch", "2", "3"]),
    (
        dict(query_segment_ids=ONES[None]),
        ValueError,
        ["query_segment_ids has 3 dimensions", "1 to 2"],
    ),
    (dict(query_segment_ids=ONES * 1.0), TypeError, ["query_segment_ids", "float64"]),
    (dict(key_value_segment_ids=ONES, seqlen_q=16), ValueError, ["query_segment_ids"]),
    (dict(query_segment_ids=ids_of(1, 2, 1)), ValueError, ["position 2 of batch entry 1"]),
    (
        dict(kv_start=np.zeros((1, 3, 16)), kv_end=np.zeros((1, 2, 16)), seqlen_k=16),
        ValueError,
        ["kv_end has 2 heads", "divisor of 3"],
    ),
    (dict(query_segment_ids=ONES, query_offset=3), ValueError, ["query_offset", "attention_chunk"]),
    (
        dict(query_segment_ids=ONES, causal=True),
        ValueError,
        ["causal", "cu_seqlens_q", "is_causal"],
    ),
    (dict(cu_seqlens_k=[0, 4], seqlen_q=4, seqlen_k=4), ValueError, ["cu_seqlens_q is not"]),
    (
        dict(cu_seqlens_q=[0, 4], cu_seqlens_k=[0, 2, 4], seqlen_q=4, seqlen_k=4),
        ValueError,
        ["3", "2 like"],
    ),
    (
        dict(cu_seqlens_q=[0, 4, 3], seqlen_q=4),
        ValueError,
        ["cu_seqlens_q is 3 at position 2", "before"],
    ),
    (
        dict(cu_seqlens_q=[[0, 4], [0, 5]], seqlen_q=4),
        ValueError,
        ["cu_seqlens_q is 5 at position 1 of batch entry 1", "at most 4", "rows"],
    ),
    (
        dict(cu_seqlens_q=[0, 4], cu_seqlens_k=[0, 7], seqlen_q=4, seqlen_k=6),
        ValueError,
        ["cu_seqlens_k is 7 at position 1", "at most 6", "keys"],
    ),
    (
        dict(cu_seqlens_q=[0, 4], seqlen_q=4, seqlen_k=3),
        ValueError,
        ["cu_seqlens_q is 4 at position 1", "at most 3", "keys"],
    ),
    (dict(cu_seqlens_q=[0, 4], seqlen_q=4, window=3), ValueError, ["window is 3", "pair"]),
    (
        dict(cu_seqlens_q=[0, 4], seqlen_q=4, window=(-2, 0)),
        ValueError,
        ["window is (-2, 0)", "-1"],
    ),
    (dict(cu_seqlens_q=[0, 4], seqlen_q=4, causal=1), TypeError, ["causal", "bool"]),
    (dict(cu_seqlens_q=[0, 4], seqlen_q=4.0), TypeError, ["seqlen_q is 4.0"]),
    (dict(cu_seqlens_q=[0, 4], seqlen_q=-1), ValueError, ["seqlen_q is -1"]),
]


@pytest.mark.parametrize(
    ("given", "error", "words"), BAD_TABLES, ids=[str(list(x[0])) for x in BAD_TABLES]
)
def test_bad_table(given, error, words):
    given = {n: x.astype(np.int32) if n.startswith("kv_") else x for n, x in given.items()}
    with pytest.raises(error) as raised:
        jax_fa3.make_visibility(**given)
    message = str(raised.value)
    assert all(word in message for word in words) and "expected" in message, message


X = np.zeros((16, 4, 32), "bfloat16")
BAD_VARLEN = [
    (
        dict(query=X[None], key=X[None], value=X[None]),
        ValueError,
        ["query", "(1, 16, 4, 32)", "(rows, heads, head_dim)"],
    ),
    (dict(cu_seqlens_q=[0, 16.0]), TypeError, ["cu_seqlens_q", "float"]),
    (dict(cu_seqlens_q=[0, 9, 7]), ValueError, ["cu_seqlens_q is 7 at position 2"]),
    (dict(softmax_scale="1"), TypeError, ["softmax_scale is '1'", "Python number"]),
    (dict(softmax_scale=np.inf), ValueError, ["softmax_scale is inf", "finite"]),
    (
        dict(cu_seqlens_q=[[0, 16]]),
        ValueError,
        ["cu_seqlens_q has shape (1, 2)", "(documents + 1,)"],
    ),
    (
        dict(cu_seqlens_q=[]),
        ValueError,
        ["cu_seqlens_q has shape (0,)", "(documents + 1,)", "int32"],
    ),
    (dict(cu_seqlens_k=[[]]), ValueError, ["cu_seqlens_k has shape (1, 0)", "(documents + 1,)"]),
    (dict(cu_seqlens_q=16), ValueError, ["cu_seqlens_q has shape ()", "(documents + 1,)"]),
    (dict(cu_seqlens_q=None), TypeError, ["cu_seqlens_q is a NoneType", "expected an array"]),
    (dict(cu_seqlens_q=[0, 9, 17]), ValueError, ["cu_seqlens_q is 17 at position 2", "16"]),
    (
        dict(cu_seqlens_k=[0, 20], key=X[:15], value=X[:15]),
        ValueError,
        ["cu_seqlens_k is 20 at position 1", "15, the number of keys"],
    ),
    (dict(max_seqlen_q=1.5), TypeError, ["max_seqlen_q", "1.5", "int"]),
    (dict(window_size=4), ValueError, ["window_size is 4", "pair"]),
    (dict(causal=None), TypeError, ["causal", "None", "bool"]),
    (dict(query=None), TypeError, ["query is None"]),
    (dict(key=X[:, 0]), ValueError, ["key has shape (16, 32)", "(rows, heads, head_dim)"]),
    (dict(query=X[:8]), ValueError, ["cu_seqlens_k is None", "8", "16"]),
    (
        dict(
            cu_seqlens_k=[0, 16],
            causal=True,
            visibility=jax_fa3.make_visibility(
                cu_seqlens_q=[0, 16], cu_seqlens_k=[0, 16], seqlen_q=16, seqlen_k=16
            ),
        ),
        ValueError,
        ["visibility was made with window=", "expected window="],
    ),
    (  # a table says where documents are, and what stands beside it is checked all the same
        dict(
            cu_seqlens_q=[0, 9, 5],
            visibility=jax_fa3.make_visibility(cu_seqlens_q=[0, 16], seqlen_q=16),
        ),
        ValueError,
        ["cu_seqlens_q is 5"],
    ),
]


@pytest.mark.parametrize(
    ("change", "error", "words"), BAD_VARLEN, ids=[str(list(x[0])) for x in BAD_VARLEN]
)
def test_bad_varlen(change, error, words):
    good = dict(query=X, key=X, value=X, cu_seqlens_q=[0, 16])
    with pytest.raises(error) as raised:
        jax_fa3.flash_attention_varlen(**good | change)
    message = str(raised.value)
    assert all(word in message for word in words) and "expected" in message, message
    assert "batch" not in message and " scale" not in message, message
