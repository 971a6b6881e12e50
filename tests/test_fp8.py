"""The forward pass in float8: what is rounded, what is not, and that it goes everywhere."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_fa3
from cases import Case
from collectives import collectives
from float8 import (
    FLOAT8,
    by_row,
    check,
    check_values_with_a_mean,
    dequantised,
    operands,
    quantised,
    wide,
)
from jax_fa3 import dot_product_attention, quantize_qkv, route
from meshes import KINDS, STRATEGIES, both_kinds, compiled_for, mesh_of, place, run
from transforms import assert_near

CASES = [
    Case(head_dim=64, seqlen_q=150, seqlen_k=300),
    Case(head_dim=128, seqlen_q=257, seqlen_k=257, causal=True, heads_q=4, dtype="float16"),
    Case(head_dim=96, seqlen_q=40, seqlen_k=1300, causal=True, offset=1260, heads_q=3, heads_kv=1),
    Case(
        head_dim=80, window=(40, 10), offset=(-3, 7), key_lengths=(65, 17), query_lengths=(30, 65)
    ),
    Case(head_dim=192, head_dim_v=128, seqlen_q=130, key_lengths=(0, 65), scale=-0.1),
    Case(seqlen_k=0),
    Case(seqlen_q=0),
    Case(batch=0),
]


def case_name(case):
    return case.name


def attend(case, *arrays, **more):
    return dot_product_attention(
        *arrays, return_residual=True, **case.options, **case.index_arrays, **more
    )


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_float8_inputs(case):
    x = quantised(case)
    out, lse = attend(case, **x._asdict())
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    check(case, (out, lse), dequantised(x))


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_sixteen_bit_inputs(case):
    """forward_dtype is quantize_qkv by blocks, and float8 attention of what it gives."""
    out, lse = attend(case, *case.inputs()[:3], forward_dtype=FLOAT8)
    assert (out.dtype, lse.dtype) == (case.dtype, jnp.float32)
    check(case, (out, lse), dequantised(quantised(case)))


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_values_with_a_mean(head_dim, causal):
    case = Case(batch=1, seqlen_q=60, seqlen_k=2100, heads_q=2, heads_kv=1, head_dim=head_dim)
    case = dataclasses.replace(case, causal=causal, offset=2040)
    check_values_with_a_mean(case, lambda x: attend(case, **x._asdict()))


def test_mask_and_bias():
    query, key, value = operands()
    x = quantize_qkv(query, key, value)._asdict()
    mask = np.tri(140, dtype=bool)
    want = dot_product_attention(**x, is_causal=True)
    assert_near(dot_product_attention(**x, mask=mask), want)
    bias = np.where(mask, 0, -np.inf).astype(np.float32)
    assert_near(dot_product_attention(**x, bias=bias), want)
    call = functools.partial(dot_product_attention, query, key, value, mask=mask)
    assert_near(call(forward_dtype=FLOAT8, implementation="xla"), want)
    np.testing.assert_array_equal(call(forward_dtype=FLOAT8), call())


@pytest.mark.parametrize("shape", [(), (2, 2), (2, 2, 1), (2, 2, 2)], ids=str)
def test_every_shape_of_scales(shape):
    """Scales multiply the arrays: exactly so where both are powers of two."""
    arrays = [np.sign(wide(x)).astype(ml_dtypes.float8_e4m3fn) for x in operands()]
    descale = 2.0 ** np.random.default_rng(1).integers(-2, 2, shape).astype(np.float32)
    of_value = descale if len(shape) < 3 else descale[..., 0]
    got = dot_product_attention(
        *arrays, query_descale=descale, key_descale=descale, value_descale=of_value
    )
    full = np.broadcast_to(descale.reshape(*shape, *(1,) * (3 - len(shape))), (2, 2, 2))
    scaled = [wide(x) * by_row(full, 140) for x in arrays[:2]]
    value = wide(arrays[2]) * by_row(np.broadcast_to(of_value, (2, 2))[..., None], 140)
    cast = [x.astype(ml_dtypes.float8_e4m3fn) for x in (*scaled, value)]
    assert all(np.array_equal(wide(c), x) for c, x in zip(cast, (*scaled, value), strict=True))
    np.testing.assert_array_equal(wide(got), wide(dot_product_attention(*cast)))
    unbatched = [
        dot_product_attention(
            *(x[b] for x in arrays),
            query_descale=full[b],
            key_descale=full[b],
            value_descale=np.broadcast_to(of_value, (2, 2))[b],
        )
        for b in range(2)
    ]
    np.testing.assert_array_equal(wide(got), wide(np.stack(unbatched)))


def test_padding_reaches_neither_scale_nor_result():
    arrays, lengths = operands(), np.array([100, 7], np.int32)
    spoilt = [np.array(x) for x in arrays]
    for x in spoilt:
        for b in range(2):
            x[b, lengths[b] :: 2] = 1e30
            x[b, lengths[b] + 1 :: 2] = np.nan
    index = dict(query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    clean, dirty = (quantize_qkv(*x, **index) for x in (arrays, spoilt))
    for c, d in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(wide(c), wide(d))
    clean, dirty = (
        dot_product_attention(*x, **index, forward_dtype=FLOAT8) for x in (arrays, spoilt)
    )
    np.testing.assert_array_equal(wide(clean), wide(dirty))
    assert not np.any(wide(clean)[1, 7:])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nonfinite_elements_become_nan_where_they_are(poison):
    query, key, value = operands()
    clean = wide(dot_product_attention(query, key, value, forward_dtype=FLOAT8))
    query[0, 5, 1, 3] = poison
    got = wide(dot_product_attention(query, key, value, forward_dtype=FLOAT8))
    assert np.all(np.isnan(got[0, 5, 1]))
    rest = np.ones(got.shape, bool)
    rest[0, 5, 1] = False
    assert np.all(np.isfinite(got[rest]))
    np.testing.assert_array_equal(got[:, :, 0], clean[:, :, 0])
    value[1, 9, 0, 2] = poison
    got = wide(dot_product_attention(*operands()[:2], value, forward_dtype=FLOAT8))
    assert np.all(np.isnan(got[1, :, 0, 2])) and np.isnan(got).sum() == 140


# ---- derivatives


def rotated_back(x, seed=0):
    """x [..., head_dim] in the basis from which quantize_qkv rotates."""
    eye = np.eye(x.shape[-1], dtype=np.float32)[None, :, None]
    rotated = quantize_qkv(eye, eye, eye, rotation_seed=seed)
    return x @ (wide(rotated.query)[0, :, 0] * wide(rotated.query_descale)[0, 0, 0]).T


def test_gradients_are_those_at_the_rounded_arrays():
    case = Case(head_dim=32, heads_q=4, seqlen_q=50, seqlen_k=170, causal=True, offset=120)
    query, key, value, dout, dlse = case.inputs()
    _, vjp = jax.vjp(lambda *x: attend(case, *x, forward_dtype=FLOAT8), query, key, value)
    got = vjp((jnp.asarray(dout), jnp.asarray(dlse)))
    query, key, value = dequantised(quantised(case))
    results = case.reference((rotated_back(query), rotated_back(key), value, dout, dlse))
    for name, gradient in zip(("dquery", "dkey", "dvalue"), got, strict=True):
        assert gradient.dtype == case.dtype
        assert_near(gradient, getattr(results, name), relative=0.02)


def test_what_has_no_derivative_says_so():
    query, key, value = operands()

    def loss(query):
        out = dot_product_attention(query, key, value, forward_dtype=FLOAT8, implementation="xla")
        return out.astype(jnp.float32).sum()

    def of_float8(query):
        x = quantize_qkv(query, key, value)
        return dot_product_attention(**x._asdict()).astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="float8 inputs have no gradient.*forward_dtype"):
        jax.grad(of_float8)(query)
    with pytest.raises(NotImplementedError, match="first derivatives"):
        jax.grad(lambda x: jax.grad(loss)(x).astype(jnp.float32).sum())(query)


# ---- transforms and meshes

ARRAY, SCALE, ROWS = P("data", None, "model"), P("data", "model"), P(None, "seq")


def from_sixteen_bits(query, key, value):
    """Output, LSE and gradients."""

    def call(*x):
        return dot_product_attention(*x, forward_dtype=FLOAT8, is_causal=True, return_residual=True)

    results, vjp = jax.vjp(call, query, key, value)
    return *results, *vjp(jax.tree.map(jnp.cos, results))


def from_float8(*x, **options):
    return dot_product_attention(
        **jax_fa3.QuantizedQKV(*x)._asdict(), is_causal=True, return_residual=True, **options
    )


def from_prepared(*x):
    return from_float8(*x, value_is_prepared=True)


FUNCTIONS = {f.__name__: f for f in (from_sixteen_bits, from_float8, from_prepared)}
PLACES = {
    "from_sixteen_bits": (ARRAY, ARRAY, ARRAY),
    "from_float8": (ARRAY, ARRAY, ARRAY, SCALE, SCALE, SCALE),
    "from_prepared": (ARRAY, ARRAY, SCALE, SCALE, SCALE, SCALE),
}


@functools.cache
def mesh_operands(function):
    """Batch 4; four query heads and two key/value heads."""
    rng = np.random.default_rng(0)
    heads = (4, 2, 2)
    arrays = tuple(rng.standard_normal((4, 140, n, 16)).astype("bfloat16") for n in heads)
    if function == "from_sixteen_bits":
        return arrays
    return tuple(quantize_qkv(*arrays, prepare_value=function == "from_prepared"))


@functools.cache
def expected(function):
    return jax.tree.map(np.asarray, run(FUNCTIONS[function], *mesh_operands(function)))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", [*KINDS.values(), None], ids=[*KINDS, "manual"])
def test_mesh(kind, function):
    """Automatic, explicit and manual axes: the results of one device, and no collective."""
    mesh = mesh_of(kind or KINDS["automatic"], data=4, model=2)
    call = FUNCTIONS[function]
    with jax.set_mesh(mesh):
        x = place(mesh, mesh_operands(function), PLACES[function])
        if kind is None:
            call = jax.shard_map(call, in_specs=PLACES[function], out_specs=ARRAY)
        compiled = compiled_for(call, *x)
        assert collectives(compiled) == []
        assert_near(compiled(*x), expected(function), relative=0.02)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_fewer_key_heads_than_devices(function):
    """Each device takes its heads of key and value, and their scales with them."""
    mesh = mesh_of(KINDS["explicit"], data=2, model=4)
    with jax.set_mesh(mesh):
        x = mesh_operands(function)
        x = place(mesh, x, (ARRAY, *[P("data")] * (len(x) - 1)))
        assert_near(run(FUNCTIONS[function], *x), expected(function), relative=0.02)


@pytest.mark.parametrize("function", FUNCTIONS)
@both_kinds
def test_split_sequences(kind, function):
    """Rows that arrive split: right, whatever travels. Parts are rounded by themselves: dQ of
    either rounding is 0.056 away from the gradient without one, so that the two are within 0.08."""
    mesh = mesh_of(kind, seq=4)
    with jax.set_mesh(mesh):
        specs = [ROWS if spec == ARRAY else P() for spec in PLACES[function]]
        x = place(mesh, mesh_operands(function), specs)
        assert_near(run(FUNCTIONS[function], *x), expected(function), relative=0.08)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_context_parallel(strategy):
    call = functools.partial(
        STRATEGIES[strategy],
        axis_name="seq",
        is_causal=True,
        return_residual=True,
        forward_dtype=FLOAT8,
    )
    with jax.set_mesh(mesh_of(seq=2)):
        call = jax.shard_map(call, in_specs=ROWS, out_specs=ROWS)
        got = run(call, *mesh_operands("from_sixteen_bits"))
    assert_near(got, expected("from_sixteen_bits")[:2], relative=0.06)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_vmap_scan_and_remat(function, implementation):
    options = {
        "from_sixteen_bits": dict(forward_dtype=FLOAT8),
        "from_float8": {},
        "from_prepared": dict(value_is_prepared=True),
    }[function]
    call = functools.partial(
        dot_product_attention, is_causal=True, implementation=implementation, **options
    )
    names = jax_fa3.QuantizedQKV._fields
    x = dict(zip(names, mesh_operands(function), strict=False))
    want = expected(function)[0]
    mapped = jax.jit(jax.vmap(lambda x: call(**x)))(jax.tree.map(lambda a: a[:, None], x))
    assert_near(mapped[:, 0], want)
    _, scanned = jax.lax.scan(
        lambda _, x: (None, jax.checkpoint(lambda x: call(**x))(x)),
        None,
        jax.tree.map(lambda a: a[:, None], x),
    )
    assert_near(scanned[:, 0], want)


def test_doctor_answers_for_float8(capsys):
    """The plans of both passes; of float8 inputs there is one, with room to transpose value."""
    shape = (1, 256, 2, 64)
    plans = functools.partial(re.findall, r"(\w+) plan:.*?workspace_bytes=(\d+)")
    jax_fa3.doctor(jax.ShapeDtypeStruct(shape, "bfloat16"), forward_dtype=FLOAT8)
    forward, backward = plans(capsys.readouterr().out)
    assert forward == ("forward", "0") and backward[0] == "backward"
    x = jax.ShapeDtypeStruct(shape, FLOAT8)
    jax_fa3.doctor(x)
    assert plans(capsys.readouterr().out) == [("forward", f"{2 * 64 * 256}")]
    jax_fa3.doctor(x, x, jax.ShapeDtypeStruct((1, 2, 64, 256), FLOAT8), value_is_prepared=True)
    assert plans(capsys.readouterr().out) == [("forward", "0")]


@pytest.mark.parametrize(("dtype", "forward_dtype"), [("bfloat16", FLOAT8), (FLOAT8, None)])
def test_doctor_says_what_has_no_float8_kernel(dtype, forward_dtype, capsys):
    jax_fa3.doctor(jax.ShapeDtypeStruct((1, 256, 2, 72), dtype), forward_dtype=forward_dtype)
    answer = capsys.readouterr().out
    assert "head_dim must be a multiple of 16 for float8" in answer and "plan" not in answer


# ---- errors

Q, K = operands()[:2]
Q8 = np.asarray(Q).astype(ml_dtypes.float8_e4m3fn)
SCALES = np.ones((2, 2), np.float32)
WRONG = [
    (dict(forward_dtype="float8_e5m2"), ValueError, ["forward_dtype", "float8_e5m2", FLOAT8]),
    (dict(forward_dtype=8), ValueError, ["forward_dtype is 8", FLOAT8]),
    (
        dict(query=np.float32(Q), key=np.float32(K), value=np.float32(K), forward_dtype=FLOAT8),
        TypeError,
        ["query", "float32", "bfloat16 or float16", "forward_dtype"],
    ),
    (dict(query=Q8), TypeError, ["key", "bfloat16", FLOAT8]),
    (dict(query_descale=SCALES), ValueError, ["query_descale", "bfloat16", FLOAT8]),
    (dict(value_is_prepared=True), TypeError, ["key", "bfloat16", "value_is_prepared"]),
]
WRONG_FLOAT8 = [
    (dict(forward_dtype=FLOAT8), TypeError, ["query", FLOAT8, "forward_dtype"]),
    (
        dict(key_descale=np.ones((2, 3), np.float32)),
        ValueError,
        ["key_descale", "(2, 3)", "(2, 2)"],
    ),
    (
        dict(query_descale=np.ones((2, 2, 3), np.float32)),
        ValueError,
        ["query_descale", "(2, 2, 3)", "(2, 2, 2)"],
    ),
    (dict(value_descale=SCALES[..., None]), ValueError, ["value_descale", "(2, 2, 1)", "(2, 2)"]),
    (dict(value_descale=SCALES.astype("float16")), TypeError, ["value_descale", "float16"]),
    (
        dict(value_is_prepared=True),
        ValueError,
        ["value", "(2, 140, 2, 16)", "(2, 2, 2, 256)", "value_is_prepared"],
    ),
    (dict(value_is_prepared=2), TypeError, ["value_is_prepared", "2"]),
    (dict(sequence_parallel="ring"), ValueError, ["sequence_parallel", "ring", FLOAT8]),
    (dict(implementation="fa3"), NotImplementedError, ["fa3", str(route.device_reason())]),
]


@pytest.mark.parametrize(
    ("good", "change", "error", "words"),
    [(Q, *wrong) for wrong in WRONG] + [(Q8, *wrong) for wrong in WRONG_FLOAT8],
)
def test_wrong_calls(good, change, error, words):
    with pytest.raises(error) as caught:
        dot_product_attention(**dict(query=good, key=good, value=good) | change)
    assert all(word in str(caught.value) for word in words), caught.value


def test_head_dims_without_a_float8_kernel_are_named():
    x = Q[..., :8]
    with pytest.raises(NotImplementedError, match="head_dim must be a multiple of 16 for float8"):
        dot_product_attention(x, x, x, forward_dtype=FLOAT8, implementation="fa3")
    assert "got 8" in jax_fa3.is_supported(x, x, x, forward_dtype=jnp.float8_e4m3fn)
    assert "got 8" in jax_fa3.is_supported(*[x.astype(ml_dtypes.float8_e4m3fn)] * 3)


def test_ring_attention_takes_no_float8_inputs():
    call = functools.partial(jax_fa3.ring_attention, axis_name="seq")
    with (
        jax.set_mesh(mesh_of(seq=2)),
        pytest.raises(TypeError, match="query has dtype float8_e4m3fn.*forw"),
    ):
        jax.shard_map(call, in_specs=ROWS, out_specs=ROWS)(Q8, Q8, Q8)
