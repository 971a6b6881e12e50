"""Biases and dense masks on their way to the kernels: the custom calls they become, when a bias'
gradient is made, what jax.vmap copies, and what runs through XLA."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa3
from float8 import FLOAT8
from jax_fa3 import dot_product_attention, native, route, xla
from jax_fa3.operands import Extents, Operands, Outputs
from jax_fa3.options import AttentionOptions, dense_mask_words
from jax_fa3.reference import Reference
from meshes import both_kinds, mesh_of, place, run
from programs import backward_attributes, custom_calls, forward_attributes, lower, operands
from programs import operations as operations_of
from transforms import assert_near

BIAS, MASK = (1, 4, 40, 44), (2, 1, 1, 44)
PADDED = "1x4x40x48xbf16"
WORDS = 1 * 2 + 1 * 2 + 44 * 1 + 8  # of a mask's one row and 44 keys
TABLE = f"2x1x{WORDS}xi32"
QUERY, KEY = "2x40x4x64xbf16", "2x44x2x64xbf16"


def bias_and_mask(bias=BIAS, mask=MASK, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(bias, dtype), jax.ShapeDtypeStruct(mask, "bool")


def loss(*x, **options):
    out = dot_product_attention(*x, **options)
    return jnp.sum(out.astype(jnp.float32))


def backward_call(text):
    """Attributes, operand types and result types of the one backward call."""
    ((_, *call),) = (call for call in custom_calls(text) if call[0] == "jax_fa3_backward")
    return call


def test_words_of_a_table():
    """As src/attention/dense_mask.h counts them."""
    assert dense_mask_words(1, 44) == WORDS
    assert dense_mask_words(100, 90) == 2 * 2 + 100 * 3 + 90 * 4 + 8
    assert dense_mask_words(64, 256) == 1 * 2 + 64 * 8 + 256 * 2 + 8
    assert dense_mask_words(65, 257) == 2 * 3 + 65 * 9 + 257 * 3 + 8


def test_forward():
    """The bias, filled up, and the mask's table stand behind all other operands."""
    lengths = jax.ShapeDtypeStruct((2,), "int32")

    def call(query, key, value, bias, mask, lengths):
        return dot_product_attention(
            query, key, value, bias, mask, query_offset=lengths, is_causal=True
        )

    text = lower(call, *operands(seqlen_k=44), *bias_and_mask(), lengths)
    made, (target, attributes, args, results) = custom_calls(text)
    names = dict(operands=("mask",), results=("mask_table",))
    assert made == ("jax_fa3_dense_mask", names, ["2x1x1x44xi1"], [TABLE])
    assert target == "jax_fa3_forward"
    names = "query_offset", "bias", "dense_mask"
    assert attributes == forward_attributes(*names) | dict(window_right="0 : i32")
    assert args == [QUERY, KEY, KEY, "2xi32", PADDED, TABLE]
    assert results == [QUERY, "2x4x40xf32", "1xi32"]
    assert operations_of(text) == ["custom_call", "custom_call", "pad"]


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_one_of_them(name):
    """Whole packets of keys need no filling."""
    array = dict(zip(("bias", "mask"), bias_and_mask((2, 1, 1, 48), (1, 4, 40, 1)), strict=True))

    def call(query, key, value, array):
        return dot_product_attention(query, key, value, **{name: array})

    *made, forward = custom_calls(lower(call, *operands(), array[name]))
    if name == "bias":
        assert not made and forward[1] == forward_attributes("bias")
        assert forward[2][3:] == ["2x1x1x48xbf16"]
    else:
        ((_, _, args, (table,)),) = made
        assert args == ["1x4x40x48xi1"]  # a table has all keys
        assert forward[1] == forward_attributes("dense_mask")
        assert forward[2][3:] == [table] == [f"1x4x{dense_mask_words(40, 48)}xi32"]


@pytest.mark.parametrize("wanted", [False, True], ids=["constant", "learned"])
def test_backward(wanted):
    """A bias' gradient is a result of the kernels where it is asked for, of the filled shape."""
    gradient = jax.grad(loss, (0, 1, 2, 3) if wanted else (0, 1, 2))
    text = lower(gradient, *operands(seqlen_k=44), *bias_and_mask())
    forward_table, forward, *of_backward = custom_calls(text)
    backward_table, (target, attributes, args, results) = of_backward
    assert forward_table == backward_table and target == "jax_fa3_backward"
    gradients = ["dbias"] * wanted
    assert attributes == backward_attributes("bias", "dense_mask", gradients=gradients)
    assert args == [QUERY, KEY, KEY, QUERY, "2x4x40xf32", QUERY, PADDED, TABLE]
    assert results[:-1] == [QUERY, KEY, KEY] + [PADDED] * wanted
    extents = Extents(2, 40, 44, 4, 2, 64, 64)
    options = AttentionOptions(scale=0.125)
    plan = native.plan("backward", "bfloat16", extents, options, arrays=["bias", "mask"])
    assert results[-1] == f"{plan['workspace_bytes']}xui8"
    assert ("slice" in operations_of(text)) == wanted


def test_the_bias_alone():
    gradient = jax.grad(loss, 3)
    _, args, results = backward_call(
        lower(gradient, *operands(), bias_and_mask(BIAS[:3] + (48,))[0])
    )
    assert args[-1] == results[3] == PADDED


@pytest.mark.parametrize("head_dim", [16, 32, 40])
def test_small_head_dims_have_kernels_of_their_own(head_dim):
    """Of 32 for a bias alone."""
    x = operands(head_dim=head_dim)
    bias, _ = bias_and_mask((1, 1, 1, 48))
    for arrays, compiled in (((), 64), ((bias,), 32 if head_dim <= 32 else 64)):
        variant = "bias" if arrays else "plain"
        assert "jax_fa3_forward" in lower(dot_product_attention, *x, *arrays)
        arguments = route.Arguments(*x, *arrays)
        plans = route.plans(arguments, arguments.options())
        assert [plan["head_dim"] for plan in plans.values()] == [compiled] * 2
        assert [plan["variant"] for plan in plans.values()] == [variant] * 2


def test_a_mask_makes_tiles_differ():
    """So they are handed out one by one, deepest rows first; those with a bias alone are equal."""
    x = operands(seqlen_q=500, seqlen_k=44)
    for name, dtype, differ in (("bias", "bfloat16", False), ("mask", "bool", True)):
        arguments = route.Arguments(*x, **{name: jax.ShapeDtypeStruct((44,), dtype)})
        forward = route.plans(arguments, arguments.options())["forward"]
        assert forward["variant"] == name
        assert (forward["longest_first"], forward["by_counter"]) == (differ, differ)


# What stands between a bias and jax.grad.
WRAPPERS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "remat of jit": lambda f: jax.checkpoint(jax.jit(f)),
    "vmap": lambda f: lambda *x: jax.vmap(f)(*(y[None] for y in x))[0],
    "scan": lambda f: lambda *x: jax.lax.scan(lambda c, _: (c + f(*x), None), 0.0, None, 2)[0],
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_gradient_is_made_where_it_is_wanted(wrap):
    """However the call is wrapped, by whatever is differentiated: also if that is one function,
    differentiated in turn by one and the other."""
    x = *operands(seqlen_k=44), bias_and_mask()[0]
    function = wrap(loss)
    for arguments in ((0, 1, 2), (0, 3), (0, 1, 2), (3,), (1,)):
        attributes, *_ = backward_call(lower(jax.grad(function, arguments), *x))
        assert ("dbias" in attributes["results"]) == (3 in arguments), arguments


def test_gradients_of_one_trace():
    """Two gradients of one traced call, whose backward passes come after both forward passes."""
    rng = np.random.default_rng(0)
    x = [jnp.asarray(rng.standard_normal((1, 8, 2, 8)), jnp.float32) for _ in range(3)]
    bias = jnp.asarray(rng.standard_normal((1, 2, 8, 8)), jnp.float32)
    function = jax.jit(loss)
    want = jax.grad(loss, (0, 3))(*x, bias)
    _, of_query = jax.vjp(lambda query: function(query, *x[1:], bias), x[0])
    _, of_both = jax.vjp(lambda query, bias: function(query, *x[1:], bias), x[0], bias)
    _, of_query_again = jax.vjp(lambda query: function(query, *x[1:], bias), x[0])
    one = jnp.float32(1)
    for got in (of_query(one), of_both(one), of_query_again(one)):
        for g, w in zip(got, want, strict=False):
            np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)
    assert np.abs(want[1]).max() > 0.01


def test_xla_makes_a_gradient_where_it_is_wanted():
    x = *operands("float32", seqlen_k=44), bias_and_mask(dtype="float32")[0]
    in_place = "stablehlo.dynamic_update_slice"  # of the bias' gradient alone
    for arguments in ((0, 1, 2), (0, 1, 2, 3)):
        text = lower(jax.grad(loss, arguments), *x, platform="cpu")
        assert (in_place in text) == (3 in arguments)


def test_an_lse_without_cotangent():
    """Only what reaches the loss goes into the backward pass."""

    def of_out(query, key, value):
        out, _ = dot_product_attention(query, key, value, return_residual=True)
        return jnp.sum(out.astype(jnp.float32))

    def of_lse(query, key, value):
        return jnp.sum(dot_product_attention(query, key, value, return_residual=True)[1])

    for function, has_dlse in ((of_out, False), (of_lse, True)):
        attributes, args, _ = backward_call(lower(jax.grad(function), *operands()))
        assert ("dlse" in attributes["operands"]) == has_dlse and args[5] == QUERY


MAPPED = [  # of query, bias and mask; the shapes that the kernels get, without their last dimension
    ((0, None, None), (1, 4, 40), (1, 1), "what all calls share stays as it is"),
    ((0, 0, None), (3, 4, 40), (1, 1), "a plane for the sequences of each call"),
    ((0, None, 0), (1, 4, 40), (3, 1), "likewise"),
    ((None, 0, 0), (3, 4, 40), (3, 1), "and query is repeated"),
]


@pytest.mark.parametrize(("axes", "bias", "mask", "_"), MAPPED, ids=lambda x: str(x)[:16])
@pytest.mark.parametrize("on_mesh", [False, True], ids=["", "mesh"])
def test_mapped_axes_copy_no_planes(axes, bias, mask, _, on_mesh):
    """In the forward pass, and in the backward pass without a bias' gradient."""
    query, key, value = operands(seqlen_k=44)
    arrays = [query, *bias_and_mask(mask=(1, 1, 1, 44))]
    arrays = [
        x if axis is None else jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
        for x, axis in zip(arrays, axes, strict=True)
    ]

    def gradient(query, bias, mask):
        def total(query, key, value):
            call = jax.vmap(lambda q, b, m: loss(q, key, value, b, m), in_axes=axes)
            return jnp.sum(call(query, bias, mask))

        return jax.grad(total)(
            query, jnp.zeros(key.shape, key.dtype), jnp.zeros(key.shape, key.dtype)
        )

    if on_mesh:
        with jax.set_mesh(mesh_of(AxisType.Explicit, data=1)):
            text = lower(gradient, *arrays)
    else:
        text = lower(gradient, *arrays)
    dims = ["x".join(map(str, shape)) for shape in (bias, mask)]
    want = [f"{dims[0]}x48xbf16", f"{dims[1]}x{WORDS}xi32"]
    forward, backward = (c for c in custom_calls(text) if c[0] != "jax_fa3_dense_mask")
    assert forward[2][0] == "6x40x4x64xbf16"
    assert forward[2][-2:] == backward[2][-2:] == want


def test_a_shared_bias_has_a_gradient_in_each_mapped_call():
    """As jax.vmap of a gradient asks for: a copy for each call, not for each sequence."""
    x, bias = operands(seqlen_k=44), bias_and_mask()[0]
    mapped = [jax.ShapeDtypeStruct((3, *y.shape), y.dtype) for y in x]
    gradient = jax.vmap(jax.grad(loss, 3), in_axes=(0, 0, 0, None))
    _, args, results = backward_call(lower(gradient, *mapped, bias))
    assert args[-1] == results[3] == "3x4x40x48xbf16"


def planes(sequences, batch=6):
    """A call of `batch` sequences whose bias and mask have a plane for several in a row each."""
    rng = np.random.default_rng(sequences)
    query, dout = (rng.standard_normal((batch, 9, 4, 8), np.float32) for _ in range(2))
    key, value = (rng.standard_normal((batch, 7, 2, 8), np.float32) for _ in range(2))
    bias = rng.standard_normal((sequences, 4, 9, 7), np.float32)
    mask = rng.random((sequences, 1, 9, 7)) < 0.7
    mask[..., 0] = True
    return (query, key, value, bias, mask), dout


@pytest.mark.parametrize("sequences", [1, 2, 3, 6])
def test_planes_for_several_sequences(sequences):
    """XLA's implementation, and the oracle, as with a repeated bias and mask."""
    (query, key, value, bias, mask), dout = planes(sequences)
    options = AttentionOptions(scale=0.3)
    x = Operands(
        *map(jnp.asarray, (query, key, value)), bias=jnp.asarray(bias), mask=jnp.asarray(mask)
    )
    outputs = xla.forward(options, x)
    got = xla.backward(options, x, outputs, Outputs(jnp.asarray(dout)))
    repeated = [np.repeat(y, 6 // sequences, 0) for y in (bias, mask)]
    oracle = Reference(query, key, value, bias, mask, scale=0.3)
    np.testing.assert_array_equal(
        oracle.out, Reference(query, key, value, *repeated, scale=0.3).out
    )
    want = oracle.gradients(dout)
    np.testing.assert_allclose(outputs.out, oracle.out, rtol=2e-5, atol=2e-6)
    for name in ("query", "key", "value", "bias"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=2e-4, atol=2e-5)


def test_reasons():
    """What the kernels do not take, and what they do."""
    x = operands(seqlen_k=44)
    bias, mask = bias_and_mask()
    of_row = jax.ShapeDtypeStruct((44,), "bfloat16")
    one_key = operands(seqlen_k=1)
    float8 = [jax.ShapeDtypeStruct(y.shape, FLOAT8) for y in x]
    long = operands(seqlen_q=1 << 18, seqlen_k=1 << 18, batch=1)

    def call_reason(x, *arrays, **options):
        arguments = route.Arguments(*x, *arrays, **options)
        return route.reasons_of(arguments, arguments.options()).call

    for arrays in ((bias,), (None, mask), (bias, mask), (of_row, mask)):
        assert call_reason(x, *arrays) is None
    assert call_reason(one_key, jax.ShapeDtypeStruct((1, 1), "bfloat16")) is None
    assert "bfloat16, not float32: cast" in call_reason(x, bias_and_mask(dtype="float32")[0])
    assert "bfloat16, not float16" in call_reason(x, bias_and_mask(dtype="float16")[0])
    assert "(40, 1): broadcast" in call_reason(x, jax.ShapeDtypeStruct((40, 1), "bfloat16"))
    assert "all 44 keys" in call_reason(x, jax.ShapeDtypeStruct((), "bfloat16"))
    for arrays in ((jax.ShapeDtypeStruct(BIAS, "float32"),), (None, mask)):
        assert "float8_e4m3fn inputs" in call_reason(float8, *arrays)
    square = jax.ShapeDtypeStruct((1, 1, 1 << 18, 1 << 18), "bool")
    assert "dense mask of at most 2147483647 words" in call_reason(long, None, square)
    assert call_reason(long, None, jax.ShapeDtypeStruct((1 << 18,), "bool")) is None


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_forward_dtype_is_left_out(name, caplog, monkeypatch, capsys):
    """The kernels run the call, in 16 bits; all that speaks of it says so."""
    x = operands()
    bias, mask = bias_and_mask((1, 1, 1, 48), (1, 1, 1, 48))
    arrays = {name: {"bias": bias, "mask": mask}[name]}
    given = dict(arrays, forward_dtype=FLOAT8)
    reason = jax_fa3.is_supported(*x, **given)
    assert reason == "the float8 kernels take no bias and no dense mask"
    route.log_fallback.cache_clear()

    def gradient(query, key, value, array):
        return jax.grad(functools.partial(loss, **{name: array}, forward_dtype=FLOAT8))(
            query, key, value
        )

    with caplog.at_level(logging.WARNING, "jax_fa3"):
        calls = custom_calls(lower(gradient, *x, arrays[name]))
    targets = [target for target, *_ in calls if target != "jax_fa3_dense_mask"]
    assert targets == ["jax_fa3_forward", "jax_fa3_backward"]
    (said,) = (record.getMessage() for record in caplog.records if record.name == "jax_fa3")
    assert (
        said == f"dot_product_attention runs its forward pass in the dtype of its inputs: {reason}"
    )
    with pytest.raises(
        NotImplementedError, match=f"{reason}. implementation=None runs its forward"
    ):
        jax.eval_shape(functools.partial(dot_product_attention, implementation="fa3", **given), *x)
    jax_fa3.doctor(*x, **given)
    said = capsys.readouterr().out
    assert f"would run its forward pass in the dtype of its inputs: {reason}" in said
    assert "forward plan: dtype=bf16, head_dim=64" in said and f"variant={name}" in said


def test_the_kernels_are_required(monkeypatch, capsys):
    """implementation="fa3" where a Hopper GPU would run the call."""
    monkeypatch.setattr(route, "device_reason", lambda: None)
    x = *operands(seqlen_k=44), *bias_and_mask()
    assert jax_fa3.is_supported(*x) is None
    call = functools.partial(dot_product_attention, implementation="fa3")
    assert [c[0] for c in custom_calls(lower(call, *x))] == [
        "jax_fa3_dense_mask",
        "jax_fa3_forward",
    ]
    jax_fa3.doctor(*x[:3], bias=x[3], mask=x[4])
    said = capsys.readouterr().out
    assert "bias bfloat16[1, 4, 40, 44], mask bool[2, 1, 1, 44]" in said
    assert "would run the Hopper kernels" in said


@both_kinds
@pytest.mark.parametrize("mapped", [(0, None, 0), (0, 0, None), (None, 0, 0)], ids=str)
def test_a_mapped_axis_over_a_mesh(kind, mapped):
    """Split like a batch, over the query alone where bias and mask are the same for all calls."""
    rng = np.random.default_rng(3)

    def normal(*shape):
        return rng.standard_normal((4, *shape), np.float32).astype("bfloat16")

    query, key, value = normal(2, 20, 4, 16), normal(2, 24, 2, 16), normal(2, 24, 2, 16)
    bias, mask = normal(1, 4, 20, 24), rng.random((4, 1, 1, 20, 24)) < 0.8
    arrays = [x if axis == 0 else x[0] for x, axis in zip((query, bias, mask), mapped, strict=True)]

    def gradients(query, bias, mask, key, value):
        def total(query, bias, key, value):
            call = jax.vmap(lambda q, b, m, k, v: loss(q, k, v, b, m), in_axes=(*mapped, 0, 0))
            return jnp.sum(jnp.sin(call(query, bias, mask, key, value)))

        return jax.grad(total, (0, 1, 2, 3))(query, bias, key, value)

    x = (*arrays, key, value)
    mesh = mesh_of(kind, data=2, model=2)
    with jax.set_mesh(mesh):
        places = [P("data") if axis == 0 else P() for axis in (*mapped, 0, 0)]
        got = run(gradients, *place(mesh, x, places))
    assert_near(got, run(gradients, *x))


def test_explicit_mesh():
    """Each device has its own planes, and makes its own table."""
    mesh = mesh_of(AxisType.Explicit, data=2, model=2)
    shardings = dict(
        query=P("data", None, "model"),
        key=P("data", None, "model"),
        bias=P(None, "model"),
        mask=P("data"),
    )

    def typed(name, x):
        sharding = NamedSharding(mesh, shardings[name])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    query, key, _ = operands(seqlen_k=44)
    bias, mask = bias_and_mask()
    key = typed("key", key)
    with jax.set_mesh(mesh):
        x = typed("query", query), key, key, typed("bias", bias), typed("mask", mask)
        text = lower(jax.grad(loss, (0, 1, 2, 3)), *x)
    calls = custom_calls(text)
    assert {c[0] for c in calls} == {"jax_fa3_dense_mask", "jax_fa3_forward", "jax_fa3_backward"}
    _, args, results = backward_call(text)
    assert args[0] == "1x40x2x64xbf16"
    assert args[-2:] == ["1x2x40x48xbf16", f"1x1x{WORDS}xi32"]
    assert results[3] == "1x2x40x48xbf16"
    # The devices of "data" have a share of the bias' gradient each, summed in float32.
    sums = re.findall(r'"stablehlo.all_reduce".*?\}\) : \((.*?)\) ->', text, re.DOTALL)
    assert sums == ["tensor<1x2x40x44xf32>"]
