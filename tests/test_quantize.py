"""quantize_qkv: scales, rotation, saturation, the layout of a prepared value."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from collectives import collectives
from float8 import FLOAT8, by_row, operands, wide
from jax_fa3 import dot_product_attention, quantize_qkv
from jax_fa3.float8.rounding import prepare_value
from jax_fa3.options import BLOCK
from meshes import both_kinds, mesh_of, place
from transforms import assert_near

SRC = Path(__file__).parents[1] / "src"


@pytest.mark.parametrize("granularity", ["tensor", "head", "block"])
def test_scales_bring_the_largest_element_to_448(granularity):
    arrays = operands()
    x = quantize_qkv(*arrays, granularity=granularity, rotation_seed=None)
    blocks = 2 if granularity == "block" else 1
    assert [d.shape for d in x[3:]] == [(2, 2, blocks), (2, 2, blocks), (2, 2)]
    for array, got, descale in zip(arrays, x[:3], (*x[3:5], x[5][..., None]), strict=True):
        assert got.dtype == FLOAT8
        largest = np.abs(wide(array)).max(-1).swapaxes(1, 2)  # [batch, heads, seq]
        if descale.shape[-1] == 2:
            want = np.stack([largest[..., :128].max(-1), largest[..., 128:].max(-1)], -1)
        else:
            want = largest.max(None if granularity == "tensor" else -1, keepdims=True)
        np.testing.assert_allclose(descale, np.broadcast_to(want / 448, descale.shape), rtol=1e-6)
        error = np.abs(wide(got) * by_row(descale, 140) - wide(array))
        assert np.all(error <= np.abs(wide(array)) / 16 + 2**-9 * by_row(descale, 140))


@pytest.mark.parametrize("head_dim", [64, 96, 40, 17])
def test_rotation(head_dim):
    """Orthogonal, the same for the same seed, and in blocks of the largest power of two."""
    eye = np.eye(head_dim, dtype=np.float32)[None, :, None]

    def rotation(seed):
        x = quantize_qkv(eye, eye, eye, rotation_seed=seed)
        assert np.array_equal(wide(x.query), wide(x.key))
        assert np.array_equal(wide(x.value)[0, :, 0] != 0, np.eye(head_dim, dtype=bool))
        return wide(x.query)[0, :, 0] * wide(x.query_descale)[0, 0, 0]

    order = head_dim & -head_dim
    matrix = rotation(3)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(head_dim), atol=1e-6)
    assert np.array_equal(matrix != 0, np.kron(np.eye(head_dim // order), np.ones((order, order))))
    assert np.array_equal(matrix, rotation(3)) and not np.array_equal(matrix, rotation(4))


SIGNS = {0: "++-+-----+-+-++-+++--+-+-++-----", 2**32 - 1: "--+-+--+-+++--++-----+--++++----"}


def test_rotation_of_a_seed_never_changes():
    """Stored keys must meet queries of a later version: the signs of seed 0, and of 2^32 - 1."""
    ones = np.ones((1, 1, 32), np.float32)
    eye = np.eye(32, dtype=np.float32)[:, None]
    for seed, signs in SIGNS.items():
        x = quantize_qkv(eye, ones, ones, rotation_seed=seed)
        assert "".join("-+"[int(row[0] > 0)] for row in wide(x.query)[:, 0]) == signs


def test_rotation_helps():
    """Outliers cost less after it."""
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((3, 1, 512, 2, 64))
    arrays += 10 * rng.standard_normal(arrays.shape) * (rng.random(arrays.shape) < 1e-3)
    arrays = arrays.astype("bfloat16")
    exact = wide(dot_product_attention(*(x.astype(np.float32) for x in arrays)))

    def error(**how):
        x = quantize_qkv(*arrays, **how)
        return np.sqrt(np.mean((wide(dot_product_attention(**x._asdict())) - exact) ** 2))

    rotated = error()
    assert rotated < 0.9 * error(rotation_seed=None)
    assert rotated < 0.9 * error(granularity="tensor", rotation_seed=None)


def test_saturation_is_counted():
    arrays = operands()
    x, saturated = quantize_qkv(*arrays, return_saturated=True)
    assert [int(n) for n in saturated] == [0, 0, 0]
    lengths = np.array([140, 7], np.int32)
    x, saturated = quantize_qkv(
        *arrays,
        rotation_seed=None,
        query_descale=np.float32(1 / 64),
        value_descale=x.value_descale / 4,
        query_seq_lengths=lengths,
        return_saturated=True,
    )
    used = np.arange(140) < lengths[:, None]
    over = (np.abs(wide(arrays[0])) * 64 >= 464) & used[..., None, None]
    assert 0 < over.sum() == int(saturated.query) and int(saturated.key) == 0
    assert np.all(np.abs(wide(x.query)[over]) == 448)
    np.testing.assert_array_equal(x.query_descale, np.full((2, 2, 1), 1 / 64))
    assert int(saturated.value) > 0


def prepared_by_the_book(value):
    """The layout of docs/fp8.md, key by key."""
    batch, seqlen, heads, head_dim = value.shape
    prepared = np.zeros((batch, heads, head_dim, -(-seqlen // 128) * 128), value.dtype)
    for p in range(prepared.shape[-1]):
        group, c, i = p // 16, p % 16 // 4, p % 4
        key = 16 * group + 8 * (i // 2) + 2 * c + i % 2
        if key < seqlen:
            prepared[..., p] = value[:, key]
    return prepared


@pytest.mark.parametrize("seqlen", [1, 140])
def test_prepared_value(seqlen):
    query, key, value = operands(seqlen=seqlen)
    value = value[..., :7]
    plain = quantize_qkv(query, key, value)
    prepared = quantize_qkv(query, key, value, prepare_value=True)
    for name, want in plain._asdict().items():
        got = wide(getattr(prepared, name))
        want = prepared_by_the_book(wide(want)) if name == "value" else wide(want)
        np.testing.assert_array_equal(got, want)
    out = wide(dot_product_attention(**plain._asdict()))
    of_prepared = dot_product_attention(**prepared._asdict(), value_is_prepared=True)
    np.testing.assert_array_equal(wide(of_prepared), out)
    unbatched = quantize_qkv(query[1], key[1], value[1], prepare_value=True)
    np.testing.assert_array_equal(wide(unbatched.value), wide(prepared.value)[1])
    of_unbatched = dot_product_attention(**unbatched._asdict(), value_is_prepared=True)
    np.testing.assert_array_equal(wide(of_unbatched), out[1])


def test_kernels_have_the_same_order_of_keys():
    """prepared_value.h's layout, read from the text, is prepare_value's."""
    header = (SRC / "attention/prepared_value.h").read_text()
    assert int(re.search(r"kPreparedBlock = (\d+);", header).group(1)) == BLOCK
    key = re.search(r"prepared_key\(int position\) \{\s*return (.*);", header).group(1)
    order = [eval(key.replace("/", "//"), dict(position=p)) for p in range(16)]
    value = np.arange(BLOCK, dtype=np.float32).reshape(1, BLOCK, 1, 1)
    want = [16 * group + key for group in range(BLOCK // 16) for key in order]
    assert np.asarray(prepare_value(jnp.asarray(value))).ravel().tolist() == want


def test_prepared_value_of_no_keys():
    query, key, value = operands()
    x = quantize_qkv(query, key[:, :0], value[:, :0], prepare_value=True)
    assert x.value.shape == (2, 2, 16, 0)
    assert not np.any(wide(dot_product_attention(**x._asdict(), value_is_prepared=True)))


def test_straight_through():
    """Gradients pass the rounding, go back through the rotation, and stop where it saturates."""
    x = operands(dtype="float32")[0][:1, :5]
    (x8, *_), vjp = jax.vjp(lambda x: quantize_qkv(x, x, x)[:1], x)
    descale = quantize_qkv(x, x, x).query_descale
    cotangent = np.random.default_rng(0).integers(-8, 8, x.shape).astype(FLOAT8)
    back = wide(vjp((jnp.asarray(cotangent),))[0])
    there = quantize_qkv(np.float32(back), x, x)  # rotates it again
    again = wide(there.query) * by_row(there.query_descale, 5)
    assert_near(again * by_row(descale, 5), wide(cotangent), relative=0.05)

    def cut(x):
        return quantize_qkv(x, x, x, rotation_seed=None, query_descale=np.float32(1 / 64)).query

    x8, vjp = jax.vjp(cut, x)
    gradient = wide(vjp(jnp.ones(x.shape, FLOAT8))[0])
    np.testing.assert_array_equal(gradient, np.where(np.abs(x) * 64 >= 464, 0.0, 64.0))
    assert 0 < (gradient == 0).sum() < x.size


@pytest.mark.parametrize("prepare", [False, True])
def test_gradients_do_not_depend_on_who_rounds(prepare):
    """What the kernels may round, 16 bits, and float32 that only XLA does."""
    arrays = operands(dtype="float32")
    lengths = dict(query_seq_lengths=np.array([140, 7], np.int32))
    arrays = [jnp.asarray(x, "bfloat16") for x in arrays]
    cotangents = np.random.default_rng(0).integers(-8, 8, arrays[0].shape).astype(FLOAT8)

    def gradients(dtype):
        call = functools.partial(quantize_qkv, prepare_value=prepare, **lengths)
        results, vjp = jax.vjp(lambda *x: call(*x)[:3], *(x.astype(dtype) for x in arrays))
        if prepare:
            given = (*[jnp.asarray(cotangents)] * 2, prepare_value(jnp.asarray(cotangents)))
        else:
            given = (jnp.asarray(cotangents),) * 3
        return [wide(x) for x in (*results, *vjp(given))]

    for got, want in zip(gradients("bfloat16"), gradients("float32"), strict=True):
        assert np.any(want)
        assert_near(got, want, relative=0.01)


@both_kinds
def test_query_heads_split_further_than_those_of_key(kind):
    """Then each device has a part of the query, and of key and value all: nothing is exchanged."""
    query, key, value = operands(heads=4)
    key, value = key[:, :, :2], value[:, :, :2]
    with jax.set_mesh(mesh := mesh_of(kind, data=2, model=4)):
        split = place(mesh, (query, key, value), [P("data", None, "model"), P("data"), P("data")])
        compiled = jax.jit(quantize_qkv).lower(*split).compile()
        assert not collectives(compiled)
        got = compiled(*split)
    assert got.query.sharding.shard_shape(got.query.shape) == (1, 140, 1, 16)
    for g, w in zip(got, quantize_qkv(query, key, value), strict=True):
        np.testing.assert_allclose(wide(g), wide(w), rtol=1e-6)


@pytest.mark.parametrize(
    "spec", [P("data", None, "model"), P(None, "model")], ids=["heads", "rows"]
)
@both_kinds
def test_gradients_on_a_mesh(kind, spec):
    """Also of rows that arrive split, which the rounding has whole."""
    arrays = operands()

    def gradients(*arrays):
        def total(*arrays):
            return sum(x.astype(jnp.float32).sum() for x in quantize_qkv(*arrays)[:3])

        return jax.grad(total, argnums=(0, 1, 2))(*arrays)

    want = gradients(*map(jnp.asarray, arrays))
    with jax.set_mesh(mesh := mesh_of(kind, data=2, model=2)):
        got = jax.jit(gradients)(*place(mesh, arrays, [spec] * 3))
    for g, w in zip(got, want, strict=True):
        assert np.any(wide(w))
        assert_near(wide(g), wide(w), relative=0.01)


def test_in_a_shard_map_each_result_varies_like_its_operand():
    query, key, value = operands()
    mesh = mesh_of(AxisType.Auto, model=2)

    def call(query, key, value):
        x, saturated = quantize_qkv(query, key, value, return_saturated=True)
        return *x[:3], lax.psum(saturated.query, "model")

    specs = P(None, None, "model"), P(), P()
    mapped = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=(*specs, P()))
    *got, saturated = jax.jit(mapped)(query, key[:, :, :1], value[:, :, :1])
    assert saturated == 0
    for g, w in zip(got, quantize_qkv(query, key[:, :, :1], value[:, :, :1]), strict=False):
        np.testing.assert_array_equal(wide(g), wide(w))


@pytest.mark.parametrize("granularity", ["tensor", "block"])
@both_kinds
def test_on_a_mesh(kind, granularity):
    """Each device its own part, and the largest element of all where one scale is for all."""
    arrays = operands(batch=4)
    call = functools.partial(quantize_qkv, granularity=granularity, prepare_value=True)
    mesh = mesh_of(kind, data=4, model=2)
    with jax.set_mesh(mesh):
        x = place(mesh, arrays, [P("data", None, "model")] * 3)
        compiled = jax.jit(call).lower(*x).compile()
        assert bool(collectives(compiled)) == (granularity == "tensor")
        rows = place(mesh, arrays, [P(None, "data")] * 3)
        results = compiled(*x), jax.jit(call)(*rows)
    want = call(*arrays)
    for got in results:
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(wide(g), wide(w), rtol=1e-6)


Q, K = operands()[:2]
Q8 = np.asarray(Q).astype(ml_dtypes.float8_e4m3fn)
SCALE = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(granularity="row"), ValueError, ["granularity", "row", "block"]),
        (dict(rotation_seed=-1), ValueError, ["rotation_seed", "-1", "at least 0"]),
        (dict(rotation_seed=0.5), TypeError, ["rotation_seed", "0.5", "an int or None"]),
        (dict(prepare_value="yes"), TypeError, ["prepare_value", "yes"]),
        (dict(query=Q8, key=Q8, value=Q8), TypeError, ["query", FLOAT8, "float32"]),
        (dict(query_seq_lengths=SCALE), TypeError, ["query_seq_lengths", "float32", "int32"]),
        (dict(key_descale=SCALE[0, :1]), ValueError, ["key_descale", "(1,)", "(2, 2)"]),
    ],
)
def test_wrong_calls(change, error, words):
    with pytest.raises(error) as caught:
        quantize_qkv(**dict(query=Q, key=K, value=K) | change)
    assert all(word in str(caught.value) for word in words), caught.value
