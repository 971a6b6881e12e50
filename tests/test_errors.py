"""Bad calls: each raises at trace time, and the message names argument, got and expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa3
from jax_fa3 import dot_product_attention


def array(*shape, dtype="bfloat16"):
    return np.zeros(shape, dtype)


def lengths(*values, dtype="int32"):
    return np.array(values, dtype)


Q, K = array(2, 16, 4, 32), array(2, 24, 2, 32)
GOOD = {"query": Q, "key": K, "value": K}
TENSORS = {"query", "key", "value", "bias", "mask", "query_seq_lengths", "key_value_seq_lengths"}

# (what is changed, exception, words of the message: argument, got, expected)
SHAPES = [
    (dict(query=array(16, 32)), ValueError, ["query", "2 dim", "(16, 32)"]),
    (dict(query=array(1, 2, 16, 4, 32)), ValueError, ["query", "5 dim", "heads, head_dim"]),
    (dict(query=array()), ValueError, ["query", "0 dim"]),
    (dict(key=array(24, 2, 32)), ValueError, ["key", "3", "4", "(24, 2, 32)"]),
    (dict(key=array(32)), ValueError, ["key", "1 dim"]),
    (dict(value=array(24, 2, 32)), ValueError, ["value", "3", "4"]),
    (dict(query=array(16, 4, 32)), ValueError, ["key", "4", "3", "query"]),
    (dict(key=array(3, 24, 2, 32)), ValueError, ["key", "batch", "3", "2"]),
    (dict(value=array(3, 24, 2, 32)), ValueError, ["value", "batch", "3", "2"]),
    (dict(key=array(1, 24, 2, 32), value=array(1, 24, 2, 32)), ValueError, ["key", "batch", "1"]),
    (dict(value=array(2, 25, 2, 32)), ValueError, ["value", "seq", "25", "24"]),
    (dict(value=array(2, 24, 4, 32)), ValueError, ["value", "heads", "4", "2"]),
    (dict(key=array(2, 24, 2, 64)), ValueError, ["key", "head_dim", "64", "32"]),
    (dict(query=array(2, 16, 4, 40)), ValueError, ["head_dim", "40", "32", "query"]),
    (dict(query=array(2, 16, 3, 32)), ValueError, ["query", "3 heads", "2", "multiple"]),
    (dict(query=array(2, 16, 1, 32)), ValueError, ["query", "1 heads", "2", "multiple"]),
    (dict(query=array(2, 16, 0, 32)), ValueError, ["query", "heads", "0", "at least 1"]),
    (dict(key=array(2, 24, 0, 32), value=array(2, 24, 0, 32)), ValueError, ["key", "heads", "0"]),
    (
        dict(query=array(2, 16, 4, 0), key=array(2, 24, 2, 0), value=array(2, 24, 2, 0)),
        ValueError,
        ["query", "head_dim", "0", "at least 1"],
    ),
    (
        dict(bias=np.zeros((2, 3, 16, 24), "float32")),
        ValueError,
        ["bias", "(2, 3, 16, 24)", "(2, 4, 16, 24)"],
    ),
    (
        dict(bias=np.zeros((2, 4, 24, 16), "float32")),
        ValueError,
        ["bias", "(2, 4, 24, 16)", "(2, 4, 16, 24)"],
    ),
    (
        dict(bias=np.zeros((1, 2, 4, 16, 24), "float32")),
        ValueError,
        ["bias", "(1, 2, 4, 16, 24)", "(2, 4, 16, 24)"],
    ),
    (
        dict(mask=np.ones((2, 4, 16, 23), bool)),
        ValueError,
        ["mask", "(2, 4, 16, 23)", "(2, 4, 16, 24)"],
    ),
    (
        dict(mask=np.ones((3, 1, 16, 24), bool)),
        ValueError,
        ["mask", "(3, 1, 16, 24)", "(2, 4, 16, 24)"],
    ),
    (dict(query_seq_lengths=lengths(1, 2, 3)), ValueError, ["query_seq_lengths", "(3,)", "(2,)"]),
    (dict(query_seq_lengths=lengths(1)), ValueError, ["query_seq_lengths", "(1,)", "(2,)"]),
    (dict(query_seq_lengths=np.int32(1)), ValueError, ["query_seq_lengths", "()", "(2,)"]),
    (dict(query_seq_lengths=lengths([1, 2])), ValueError, ["query_seq_lengths", "(1, 2)", "(2,)"]),
    (
        dict(key_value_seq_lengths=lengths(1, 2, 3)),
        ValueError,
        ["key_value_seq_lengths", "(3,)", "(2,)"],
    ),
    (dict(key_value_seq_lengths=lengths()), ValueError, ["key_value_seq_lengths", "(0,)", "(2,)"]),
    (dict(query_offset=lengths(1, 2, 3)), ValueError, ["query_offset", "(3,)", "(2,)"]),
    (dict(query_offset=lengths([1, 2])), ValueError, ["query_offset", "(1, 2)", "(2,)"]),
]

DTYPES = [
    (dict(query=Q.astype("float64")), TypeError, ["query", "float64", "bfloat16"]),
    (dict(key=K.astype("float64")), TypeError, ["key", "float64"]),
    (dict(value=K.astype("float64")), TypeError, ["value", "float64"]),
    (dict(query=Q.astype("int32")), TypeError, ["query", "int32", "bfloat16"]),
    (dict(query=Q.astype("complex64")), TypeError, ["query", "complex64", "bfloat16"]),
    (dict(query=Q.astype("bool")), TypeError, ["query", "bool", "bfloat16"]),
    (dict(query=Q.astype("float8_e4m3fn")), TypeError, ["query", "float8_e4m3fn", "bfloat16"]),
    (dict(key=K.astype("float16")), TypeError, ["key", "float16", "bfloat16", "query"]),
    (dict(value=K.astype("float32")), TypeError, ["value", "float32", "bfloat16", "query"]),
    (dict(query=Q.astype("float32")), TypeError, ["key", "bfloat16", "float32", "query"]),
    (dict(bias=np.zeros((2, 4, 16, 24), "int32")), TypeError, ["bias", "int32", "float32"]),
    (dict(mask=np.zeros((2, 4, 16, 24), "float32")), TypeError, ["mask", "float32", "bool"]),
    (dict(mask=np.zeros((2, 4, 16, 24), "int8")), TypeError, ["mask", "int8", "bool"]),
    (
        dict(query_seq_lengths=lengths(1, 1 << 31, dtype="int64")),
        ValueError,
        ["query_seq_lengths", str(1 << 31), "int32"],
    ),
    (
        dict(key_value_seq_lengths=[1, 1 << 40]),
        ValueError,
        ["key_value_seq_lengths", str(1 << 40), "int32"],
    ),
    (
        dict(query_offset=lengths(0, -(1 << 40), dtype="int64")),
        ValueError,
        ["query_offset", str(-(1 << 40)), "int32"],
    ),
    (
        dict(query_seq_lengths=lengths(1, 2, dtype="uint32")),
        TypeError,
        ["query_seq_lengths", "uint32", "int32"],
    ),
    (
        dict(query_seq_lengths=lengths(1, 2, dtype="float32")),
        TypeError,
        ["query_seq_lengths", "float32", "int32"],
    ),
    (
        dict(key_value_seq_lengths=lengths(1, 2, dtype="int16")),
        TypeError,
        ["key_value_seq_lengths", "int16", "int32"],
    ),
    (
        dict(query_offset=lengths(1, 2, dtype="float32")),
        TypeError,
        ["query_offset", "float32", "int32"],
    ),
    (dict(query_offset=lengths(1, 2, dtype="int8")), TypeError, ["query_offset", "int8", "int32"]),
]

VALUES = [
    (dict(query=None), TypeError, ["query", "None", "array"]),
    (dict(key=None), TypeError, ["key", "None", "array"]),
    (dict(value="values"), TypeError, ["value", "str", "array"]),
    (dict(query={}), TypeError, ["query", "dict", "array"]),
    (dict(scale="0.5"), TypeError, ["scale", "'0.5'", "number"]),
    (dict(scale=1j), TypeError, ["scale", "1j", "number"]),
    (dict(scale=np.ones(2)), TypeError, ["scale", "number"]),
    (dict(scale=float("nan")), ValueError, ["scale", "nan", "finite"]),
    (dict(scale=float("inf")), ValueError, ["scale", "inf", "finite"]),
    (dict(scale=1e300), ValueError, ["scale", "1e+300", "finite"]),
    (dict(is_causal=1), TypeError, ["is_causal", "1", "bool"]),
    (dict(is_causal="yes"), TypeError, ["is_causal", "'yes'", "bool"]),
    (dict(is_causal=None), TypeError, ["is_causal", "None", "bool"]),
    (dict(return_residual=1), TypeError, ["return_residual", "1", "bool"]),
    (dict(deterministic="no"), TypeError, ["deterministic", "'no'", "bool"]),
    (dict(deterministic=0), TypeError, ["deterministic", "0", "bool"]),
    (dict(sm_margin=1.5), TypeError, ["sm_margin", "1.5", "int"]),
    (dict(sm_margin=True), TypeError, ["sm_margin", "True", "int"]),
    (dict(sm_margin=-1), ValueError, ["sm_margin", "-1", "from 0 to 131"]),
    (dict(sm_margin=132), ValueError, ["sm_margin", "132", "from 0 to 131"]),
    (dict(sequence_parallel="rings"), ValueError, ["sequence_parallel", "'rings'", "'ring'"]),
    (dict(sequence_parallel=None), ValueError, ["sequence_parallel", "None", "'auto'"]),
    (
        dict(sequence_parallel="ring", mask=np.ones((1, 1, 1, 1), bool)),
        ValueError,
        ["sequence_parallel", "'ring'", "mask", "'auto'"],
    ),
    (dict(local_window_size=-1), ValueError, ["local_window_size", "-1", "at least 0"]),
    (dict(local_window_size=(-1, 0)), ValueError, ["local_window_size", "(-1, 0)", "at least 0"]),
    (dict(local_window_size=(0, -3)), ValueError, ["local_window_size", "(0, -3)", "at least 0"]),
    (dict(local_window_size=(1, 2, 3)), ValueError, ["local_window_size", "(1, 2, 3)", "pair"]),
    (dict(local_window_size=()), ValueError, ["local_window_size", "()", "pair"]),
    (dict(local_window_size=1.5), TypeError, ["local_window_size", "1.5", "int"]),
    (dict(local_window_size=(1, None)), TypeError, ["local_window_size", "None", "int"]),
    (dict(local_window_size="8"), (TypeError, ValueError), ["local_window_size", "8", "int"]),
    (dict(local_window_size=True), TypeError, ["local_window_size", "True", "int"]),
    (dict(query_offset=1.5), TypeError, ["query_offset", "1.5", "int"]),
    (dict(query_offset="1"), TypeError, ["query_offset", "'1'", "int"]),
    (dict(query_offset=1 << 40), ValueError, ["query_offset", str(1 << 40)]),
    (dict(query_offset=-(1 << 31)), ValueError, ["query_offset", str(-(1 << 31))]),
    (
        dict(implementation="cudnn"),
        ValueError,
        ["implementation", "'cudnn'", "fa3", "None runs", "jax.nn"],
    ),
    (dict(implementation="FA3"), ValueError, ["implementation", "'FA3'", "fa3", "xla"]),
    (dict(implementation=3), ValueError, ["implementation", "3", "fa3", "xla"]),
    (dict(implementation=["xla"]), ValueError, ["implementation", "xla"]),
]

# Legal calls without a kernel: implementation="fa3" says why.
SMALL = array(2, 16, 4, 12), array(2, 24, 2, 12)
LARGE = array(2, 16, 4, 264), array(2, 24, 2, 264)
NO_KERNEL = [
    (
        dict(bias=np.zeros((2, 4, 16, 24), "float32")),
        ["implementation", "fa3", "bias", "bfloat16", "float32", "cast"],
    ),
    (dict(bias=np.zeros((2, 4, 16, 1), Q.dtype)), ["implementation", "fa3", "bias", "24", "last"]),
    (
        dict(query=Q.astype("float32"), key=K.astype("float32"), value=K.astype("float32")),
        ["implementation", "fa3", "float32", "bfloat16"],
    ),
    (
        dict(query=SMALL[0], key=SMALL[1], value=SMALL[1]),
        ["implementation", "fa3", "head_dim", "12", "8"],
    ),
    (
        dict(query=LARGE[0], key=LARGE[1], value=LARGE[1]),
        ["implementation", "fa3", "head_dim", "264", "256"],
    ),
    (dict(value=array(2, 24, 2, 264)), ["implementation", "fa3", "head_dim_v", "264", "256"]),
    ({}, ["implementation", "fa3", "GPU"]),
]


def describe(entry):
    def short(value):
        return f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else repr(value)[:40]

    return ",".join(f"{name}:{short(value)}" for name, value in entry[0].items()) or "plain"


def assert_says(error, words):
    """The message has argument, got and expected, in whatever order."""
    message = str(error.value)
    assert all(word in message for word in words), f"{words} not all in: {message}"
    assert "expected" in message or "fa3" in words, f"nothing expected in: {message}"


@pytest.mark.parametrize(
    ("change", "exception", "words"),
    SHAPES + DTYPES + VALUES,
    ids=map(describe, SHAPES + DTYPES + VALUES),
)
def test_bad_call(change, exception, words):
    with pytest.raises(exception) as error:
        dot_product_attention(**GOOD | change)
    assert_says(error, words)


@pytest.mark.parametrize(("change", "exception", "words"), SHAPES, ids=map(describe, SHAPES))
@pytest.mark.parametrize("transform", ["jit", "grad", "vmap"])
def test_bad_shapes_under_transformations(change, exception, words, transform):
    """The same error while tracing; under vmap the extents are those that the function sees."""
    call = GOOD | change
    tensors = {name: value for name, value in call.items() if name in TENSORS}
    rest = {name: value for name, value in call.items() if name not in TENSORS}

    def function(query, rest_of_tensors):
        return dot_product_attention(query, **rest_of_tensors, **rest).astype(jnp.float32).sum()

    query = tensors.pop("query")
    with pytest.raises(exception) as error:
        match transform:
            case "jit":
                jax.eval_shape(function, query, tensors)
            case "grad":
                jax.eval_shape(jax.grad(function), query, tensors)
            case "vmap":
                tensors = jax.tree.map(lambda x: np.stack([x, x]), tensors)
                jax.eval_shape(jax.vmap(function), np.stack([query, query]), tensors)
    assert_says(error, words)


@pytest.mark.parametrize(("change", "words"), NO_KERNEL, ids=map(describe, NO_KERNEL))
def test_no_kernel_for_this_call(change, words):
    """`fa3` raises with the reason, `None` runs through XLA, is_supported gives the reason."""
    call = GOOD | change
    with pytest.raises(NotImplementedError) as error:
        dot_product_attention(**call, implementation="fa3")
    assert_says(error, words)
    reason = jax_fa3.is_supported(**call)
    assert reason and reason in str(error.value)
    assert dot_product_attention(**call).shape == (
        *call["query"].shape[:-1],
        call["value"].shape[-1],
    )


def test_traced_options_are_refused():
    """Values that must be known while tracing say so; the message names the argument."""
    for name, value, words in (
        ("scale", 0.5, ["scale", "traced", "number"]),
        ("is_causal", True, ["is_causal", "bool"]),
        ("deterministic", True, ["deterministic", "bool"]),
        ("sm_margin", 8, ["sm_margin", "int"]),
        ("local_window_size", 3, ["local_window_size", "int"]),
    ):
        with pytest.raises(TypeError) as error:
            jax.jit(lambda x, name=name: dot_product_attention(**GOOD, **{name: x}))(value)
        assert_says(error, words)


def test_unknown_keyword_is_refused():
    """Nothing is accepted and ignored: what Flax would pass on raises."""
    for name in ("dropout_rate", "precision", "broadcast_dropout", "causal", "window_size"):
        with pytest.raises(TypeError, match=name):
            dot_product_attention(**GOOD, **{name: None})


def test_fallback_is_logged_once_with_the_reason(caplog):
    call = GOOD | {"bias": np.zeros((2, 4, 16, 24), "float32")}
    jax_fa3.route.log_fallback.cache_clear()
    for _ in range(3):
        dot_product_attention(**call)
    messages = [record.getMessage() for record in caplog.records if record.name == "jax_fa3"]
    assert len(messages) == 1 and "bias" in messages[0]


def test_the_good_call_is_good():
    out, lse = dot_product_attention(
        **GOOD,
        scale=np.float32(0.5),
        is_causal=np.True_,
        local_window_size=[3, np.int64(2)],
        query_offset=np.int64(3),
        return_residual=True,
    )
    assert out.shape == Q.shape and lse.shape == Q.shape[:3]


def test_table_is_large_enough():
    assert len(SHAPES) + len(DTYPES) + len(VALUES) + len(NO_KERNEL) >= 60
