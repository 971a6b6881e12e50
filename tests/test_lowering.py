"""What a call becomes in StableHLO for CUDA, lowered on a machine that needs no GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_fa3
from cases import HEAD_DIMS
from float8 import FLOAT8
from jax_fa3 import dot_product_attention, native
from jax_fa3.operands import Extents
from jax_fa3.options import AttentionOptions
from meshes import mesh_of
from programs import (
    DEFAULTS,
    QKV,
    backward_attributes,
    custom_calls,
    forward_attributes,
    lower,
    operands,
    operations,
)

pytestmark = pytest.mark.usefixtures("forward_kernel_alone")


def vector_jacobian(*x, **options):
    """Results and gradients of x = (query, key, value, dout, ...)."""
    out, vjp = jax.vjp(functools.partial(dot_product_attention, **options), *x[:3])
    return vjp(x[3])


def test_forward_is_one_custom_call_and_nothing_else():
    text = lower(dot_product_attention, *operands())
    ((target, attributes, args, results),) = custom_calls(text)
    assert target == "jax_fa3_forward"
    assert attributes == forward_attributes()
    assert args == ["2x40x4x64xbf16", "2x48x2x64xbf16", "2x48x2x64xbf16"]
    assert results == ["2x40x4x64xbf16", "2x4x40xf32", "1xi32"]
    assert operations(text) == ["custom_call"]


def test_backward_is_one_custom_call_and_nothing_else():
    query, key, value = operands()
    text = lower(vector_jacobian, query, key, value, query)
    forward, (target, attributes, args, results) = custom_calls(text)
    assert forward[0] == "jax_fa3_forward" and target == "jax_fa3_backward"
    assert attributes == backward_attributes()
    q, k = "2x40x4x64xbf16", "2x48x2x64xbf16"
    assert args == [q, k, k, q, "2x4x40xf32", q]
    assert results[:3] == [q, k, k]
    assert len(results) == 4 and re.fullmatch(r"\d+xui8", results[3])
    assert operations(text) == ["custom_call", "custom_call"]


def test_workspace_is_the_plans():
    query, key, value = operands(batch=3, seqlen_q=333, seqlen_k=100, heads_q=6, heads_kv=3)
    extents = Extents.of(query, key, 64)
    for deterministic in (False, True):
        options = AttentionOptions(scale=0.125, deterministic=deterministic)
        plan = native.plan("backward", "bfloat16", extents, options)
        text = lower(
            functools.partial(vector_jacobian, deterministic=deterministic),
            query,
            key,
            value,
            query,
        )
        assert custom_calls(text)[1][3][3] == f"{plan['workspace_bytes']}xui8"


LENGTHS = dict(key_value_seq_lengths=jnp.array([9000]))


@pytest.mark.parametrize(
    ("options", "chunks", "beside"),
    [
        (dict(), 4, 0),
        (dict(is_causal=True), 4, 0),
        (dict(is_causal=True, sm_margin=50), 4, 0),
        (dict(is_causal=True, deterministic=True), 4, 16 * 128 * 8),  # the keys' largest
        (dict(is_causal=True, query_offset=-16_000), 4, 0),
        (dict(local_window_size=(1023, 0)), 1, 0),
        (LENGTHS, 1, 0),
        (dict(attention_chunk=1000), 1, 0),
        (dict(mask=jnp.ones((1, 1, 1, 16_384), bool)), 1, 0),
    ],
)
def test_workspace_of_a_long_call_is_that_of_a_chunk(options, chunks, beside):
    """float32 dQ and 16 bytes of statistics for each row of its heads."""
    query, *_ = operands(batch=1, seqlen_q=16_384, heads_q=16, head_dim=128)
    text = lower(functools.partial(vector_jacobian, **options), query, query, query, query)
    (results,) = [call[3] for call in custom_calls(text) if call[0] == "jax_fa3_backward"]
    heads = 16 // chunks
    assert results[-1] == f"{heads * 16_384 * (128 * 4 + 16) + 256 + beside}xui8"


def test_table_of_visibility_is_one_custom_call():
    ids = jax.ShapeDtypeStruct((2, 1500), jnp.int32)
    text = lower(lambda ids: jax_fa3.make_visibility(ids).table, ids)
    ((target, attributes, args, results),) = custom_calls(text)
    assert target == "jax_fa3_visibility"
    assert attributes["operands"] == ("query_segment_ids",)
    assert args == ["2x1500xi32"]
    words = 4 + 2 * 1500 + 2 * 4 * 24 + 2 * 1500
    assert results == [f"2x1x{words}xi32", f"{2 * 2 * 64}xui8"]  # two chunks of each plane
    assert operations(text) == ["custom_call"]


def test_residual_costs_one_transpose():
    text = lower(functools.partial(dot_product_attention, return_residual=True), *operands())
    assert operations(text) == ["custom_call", "transpose"]


def test_gradient_of_the_residual_reaches_the_kernel():
    def loss(query, key, value):
        out, lse = dot_product_attention(query, key, value, return_residual=True)
        return jnp.sum(lse)

    backward = custom_calls(lower(jax.grad(loss), *operands()))[1]
    assert backward[1] == backward_attributes(dlse=True)
    assert backward[2][6] == "2x4x40xf32"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(scale=0.5), dict(scale="5.000000e-01 : f32")),
        (dict(is_causal=True), dict(window_right="0 : i32")),
        (dict(local_window_size=(7, 3)), dict(window_left="7 : i32", window_right="3 : i32")),
        (dict(local_window_size=9), dict(window_left="9 : i32", window_right="9 : i32")),
        (
            dict(local_window_size=(7, 3), is_causal=True),
            dict(window_left="7 : i32", window_right="0 : i32"),
        ),
        (dict(local_window_size=2**31 - 1), {}),
        (dict(query_offset=-11), dict(query_offset="-11 : i32")),
        (dict(deterministic=True), dict(deterministic="true")),
        (dict(sm_margin=16), dict(sm_margin="16 : i32")),
        (dict(scale=-0.5), dict(scale="5.000000e-01 : f32")),
        (dict(scale=0.0), dict(scale="1.000000e+00 : f32")),
    ],
    ids=str,
)
def test_options_become_attributes(options, expected):
    """The same in both directions."""
    query, key, value = operands()
    text = lower(functools.partial(vector_jacobian, **options), query, key, value, query)
    calls = custom_calls(text)
    assert [call[0] for call in calls] == ["jax_fa3_forward", "jax_fa3_backward"]
    forward, backward = calls
    assert forward[1] == forward_attributes() | expected
    assert backward[1] == backward_attributes() | expected


INDEX = "query_seq_lengths", "key_value_seq_lengths", "query_offset"


@pytest.mark.parametrize(
    "names",
    [
        ["query_seq_lengths"],
        ["key_value_seq_lengths"],
        ["query_offset"],
        ["key_value_seq_lengths", "query_offset"],
        list(INDEX),
    ],
    ids="+".join,
)
def test_index_arrays_become_operands(names):
    """Those present, in the order of the contract, however the caller orders them."""
    query, key, value = operands()
    lengths = [jax.ShapeDtypeStruct((2,), "int32")] * len(names)

    def call(query, key, value, dout, *lengths):
        return vector_jacobian(
            query, key, value, dout, **dict(zip(reversed(names), lengths, strict=True))
        )

    forward, backward = custom_calls(lower(call, query, key, value, query, *lengths))
    assert forward[1] == forward_attributes(*names)
    assert backward[1] == backward_attributes(*names)
    assert forward[2][3:] == backward[2][6:] == ["2xi32"] * len(names)


def test_index_operands_stand_in_the_order_of_the_contract():
    query, key, value = operands()

    def call(query, key, value, a, b, c):
        return dot_product_attention(
            query, key, value, query_offset=c, key_value_seq_lengths=b, query_seq_lengths=a
        )

    text = lower(call, query, key, value, *[jax.ShapeDtypeStruct((2,), "int32")] * 3)
    assert re.search(r"@jax_fa3_forward\(%arg0, %arg1, %arg2, %arg3, %arg4, %arg5\)", text)


TABLE = {  # the attributes of the call that makes a table
    "seqlen_q": "40 : i32",
    "seqlen_k": "48 : i32",
    "query_offset": "0 : i32",
    "attention_chunk": "0 : i32",
    "window_left": "1073741824 : i32",
    "window_right": "1073741824 : i32",
    "results": ("visibility", "workspace"),
}
WORDS = 4 + 80 + 4 + 4 + 96  # of a plane for 40 rows and 48 keys


@pytest.mark.parametrize(
    ("told", "options", "attributes", "types", "heads"),
    [
        (
            dict(query_segment_ids=(2, 40), key_value_segment_ids=(2, 48)),
            {},
            {},
            ["2x40xi32", "2x48xi32"],
            1,
        ),
        (dict(kv_start=(2, 40)), {}, {}, ["2x1x40xi32"], 1),
        (
            dict(kv_start=(2, 40), kv_end=(2, 4, 40)),
            {},
            {},
            ["2x4x40xi32", "2x4x40xi32"],
            4,
        ),
        (
            dict(kv_end=(2, 40), query_offset=(2,)),
            dict(attention_chunk=16),
            dict(attention_chunk="16 : i32"),
            ["2x1x40xi32", "2xi32"],
            1,
        ),
        (
            dict(kv_end=(2, 40)),
            dict(attention_chunk=16, query_offset=7),
            dict(attention_chunk="16 : i32", query_offset="7 : i32"),
            ["2x1x40xi32"],
            1,
        ),
    ],
    ids=["ids", "start", "heads", "chunks", "one offset"],
)
def test_a_table_is_one_custom_call_more(told, options, attributes, types, heads):
    query, key, value = operands()
    arrays = [jax.ShapeDtypeStruct(shape, "int32") for shape in told.values()]

    def call(query, key, value, dout, *arrays):
        given = dict(zip(told, arrays, strict=True))
        return vector_jacobian(query, key, value, dout, **given, **options)

    calls = custom_calls(lower(call, query, key, value, query, *arrays))
    (target, got, operand_types, results), forward, backward = calls
    assert target == "jax_fa3_visibility"
    assert got == TABLE | attributes | dict(operands=tuple(told))
    assert operand_types == types
    table = f"2x{heads}x{WORDS}xi32"
    assert results == [table, f"{2 * heads * 64}xui8"]
    for _, got, operand_types, _ in (forward, backward):
        assert got["operands"][-1] == "visibility"
        assert operand_types[-1] == table  # behind the offsets
        assert ("query_offset" in told) == (operand_types[-2] == "2xi32")


def test_a_table_of_chunks_alone_has_its_offset():
    call = functools.partial(dot_product_attention, attention_chunk=16, query_offset=7)
    made, forward = custom_calls(lower(call, *operands()))
    assert made[1] == TABLE | dict(
        attention_chunk="16 : i32", query_offset="7 : i32", operands=("query_offset",)
    )
    assert made[2:] == (["1xi32"], [f"1x1x{WORDS}xi32", "64xui8"])
    assert forward[2][-1] == f"1x1x{WORDS}xi32"


@pytest.mark.parametrize("is_self", [True, False])
def test_documents_become_a_table(is_self):
    """Of the same rows and keys with causal and windowed attention in the kernels."""
    rows = 40 if is_self else 48
    query = jax.ShapeDtypeStruct((40, 4, 64), "bfloat16")
    key = jax.ShapeDtypeStruct((rows, 2, 64), "bfloat16")
    ends = jax.ShapeDtypeStruct((6,), "int32")

    def call(query, key, value, *cu_seqlens):
        return jax_fa3.flash_attention_varlen(
            query, key, value, *cu_seqlens, causal=True, window_size=(9, -1)
        )

    made, forward = custom_calls(lower(call, query, key, key, *[ends] * (1 if is_self else 2)))
    window = dict(window_left="9 : i32", window_right="0 : i32")
    lengths = dict(seqlen_k=f"{rows} : i32", operands=("cu_seqlens_q", "cu_seqlens_k"))
    assert made[1] == TABLE | lengths | ({} if is_self else window)
    assert made[2] == ["1x6xi32"] * 2
    others = {name: DEFAULTS[name] for name in window} if not is_self else window
    assert forward[1] == forward_attributes("visibility") | others


def test_a_mapped_table_is_still_one_call():
    query, key, value = (jax.ShapeDtypeStruct((5, *x.shape), x.dtype) for x in operands())
    ids = [jax.ShapeDtypeStruct((5, 2, n), "int32") for n in (40, 48)]

    def call(query, key, value, ids, of_keys):
        return dot_product_attention(
            query, key, value, query_segment_ids=ids, key_value_segment_ids=of_keys
        )

    made, forward = custom_calls(lower(jax.vmap(call), query, key, value, *ids))
    assert made[2:] == (["10x40xi32", "10x48xi32"], [f"10x1x{WORDS}xi32", "640xui8"])
    assert forward[2][-1] == f"10x1x{WORDS}xi32"


def test_a_table_made_before_is_an_operand():
    """One for all of the batch stays one."""
    query, key, value = operands(batch=3)
    ids = jax.ShapeDtypeStruct((1, 40), "int32")
    of_keys = jax.ShapeDtypeStruct((1, 48), "int32")
    table = jax.eval_shape(jax_fa3.make_visibility, ids, of_keys)

    def call(query, key, value, table):
        return dot_product_attention(query, key, value, visibility=table)

    ((_, _, args, _),) = custom_calls(lower(call, query, key, value, table))
    assert args[3] == f"1x1x{WORDS}xi32"


def test_padding_behind_documents_is_not_rounded():
    """In float8 the rounding takes the ends of the table for lengths."""
    query, key, value = operands(seqlen_k=40)
    ids = jax.ShapeDtypeStruct((2, 40), "int32")

    def call(query, key, value, ids):
        return dot_product_attention(query, key, value, query_segment_ids=ids, forward_dtype=FLOAT8)

    made, rounding, forward = custom_calls(lower(call, query, key, value, ids))
    assert rounding[1]["operands"][3:] == ("query_seq_lengths", "key_value_seq_lengths")
    assert rounding[2][3:] == ["2xi32", "2xi32"]
    assert forward[1]["operands"][2:] == ("prepared_value", *DESCALES, "visibility")
    assert forward[2][-1] == made[3][0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_has_kernels(head_dim, dtype):
    query, key, value = operands(dtype, head_dim=head_dim)
    text = lower(vector_jacobian, query, key, value, query)
    assert [call[0] for call in custom_calls(text)] == ["jax_fa3_forward", "jax_fa3_backward"]


def test_vmap_is_still_one_call():
    """A mapped axis becomes batch: no loop over calls."""
    x = [jax.ShapeDtypeStruct((5, *a.shape), a.dtype) for a in operands()]
    text = lower(jax.vmap(dot_product_attention), *x)
    ((_, _, args, _),) = custom_calls(text)
    assert args[0] == "10x40x4x64xbf16"
    assert operations(text) == ["custom_call"] + ["reshape"] * 5


def test_no_batch_dimension():
    x = [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in operands()]
    ((_, _, args, results),) = custom_calls(lower(dot_product_attention, *x))
    assert args[0] == "1x40x4x64xbf16" and results[1] == "1x4x40xf32"


@pytest.mark.parametrize("platform", ["cpu", "rocm", "tpu"])
def test_other_platforms_get_no_custom_call(platform):
    text = lower(dot_product_attention, *operands(), platform=platform)
    assert "jax_fa3_forward" not in text and "stablehlo.dot_general" in text


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (dict(implementation="xla"), "bfloat16"),
        ({}, "float32"),
        (dict(bias=jnp.zeros((1, 1, 40, 48))), "bfloat16"),
        (dict(mask=jnp.ones((1, 1, 40, 48), bool)), "float32"),
    ],
    ids=["xla", "float32", "bias", "mask"],
)
def test_calls_without_kernels_lower_to_xla(options, dtype):
    text = lower(functools.partial(dot_product_attention, **options), *operands(dtype))
    assert "jax_fa3_forward" not in text and "stablehlo.dot_general" in text


QUERY, KEY, VALUE = (2, 200, 4, 80), (2, 300, 2, 80), (2, 300, 2, 80)  # a kernel of 96
TYPES = ["2x200x4x80xf8E4M3FN", "2x300x2x80xf8E4M3FN", "2x300x2x80xf8E4M3FN"]
RESULTS = ["2x200x4x80xbf16", "2x4x200xf32", "1xi32"]
DESCALES = "query_descale", "key_descale", "value_descale"
ROUNDING = dict(operands=QKV, results=("query_out", "key_out", "value_out", *DESCALES))


def float8_operands():
    return [jax.ShapeDtypeStruct(shape, FLOAT8) for shape in (QUERY, KEY, VALUE)]


def test_float8_forward_is_one_custom_call():
    scales = [jax.ShapeDtypeStruct(s, "float32") for s in ((2, 4, 2), (2, 2, 3), (2, 2))]
    lengths = jax.ShapeDtypeStruct((2,), "int32")

    def call(*x):
        return dot_product_attention(
            *x[:3],
            query_descale=x[3],
            key_descale=x[4],
            value_descale=x[5],
            query_seq_lengths=x[6],
            key_value_seq_lengths=x[7],
            query_offset=x[8],
            scale=0.125,
        )

    text = lower(call, *float8_operands(), *scales, *[lengths] * 3)
    ((target, attributes, args, results),) = custom_calls(text)
    results_of = "out", "lse", "tile_counter", "workspace"
    names = dict(operands=(*QKV, *DESCALES, *INDEX), results=results_of)
    assert (target, attributes) == ("jax_fa3_forward_float8", DEFAULTS | names)
    assert args == [*TYPES, "2x4x2xf32", "2x2x3xf32", "2x2xf32", *["2xi32"] * 3]
    assert results == [*RESULTS, f"{2 * 2 * 80 * 384}xui8"]  # value, transposed
    operands = ", ".join(f"%arg{i}" for i in range(9))
    assert f"@jax_fa3_forward_float8({operands})" in text
    assert operations(text) == ["custom_call"]


def test_prepared_value_goes_as_it_is():
    query, key, _ = float8_operands()
    value = jax.ShapeDtypeStruct((2, 2, 80, 384), FLOAT8)
    text = lower(
        functools.partial(dot_product_attention, value_is_prepared=True), query, key, value
    )
    ((_, attributes, args, results),) = custom_calls(text)
    assert attributes["operands"] == ("query", "key", "prepared_value", *DESCALES)
    assert args == [*TYPES[:2], "2x2x80x384xf8E4M3FN", "2x4x1xf32", "2x2x1xf32", "2x2xf32"]
    assert results == [*RESULTS, "0xui8"]
    assert not {"transpose", "reshape"} & set(operations(text))


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_forward_dtype_prepares_value_and_keeps_the_backward_kernel(implementation):
    query, key, value = (jax.ShapeDtypeStruct(s, "float16") for s in (QUERY, KEY, VALUE))
    call = functools.partial(
        vector_jacobian, forward_dtype=FLOAT8, is_causal=True, implementation=implementation
    )
    calls = custom_calls(lower(call, query, key, value, query))
    if implementation == "xla":
        assert calls == []
        return
    there, forward, back, backward = calls
    assert [call[0] for call in calls] == [
        "jax_fa3_quantize",
        "jax_fa3_forward_float8",
        "jax_fa3_quantize",
        "jax_fa3_backward",
    ]
    rounds = ROUNDING | dict(seed="0 : ui32")
    types = [f"2x{n}x{heads}x80xf16" for n, heads in ((200, 4), (300, 2), (300, 2))]
    scales = ["2x4x2xf32", "2x2x3xf32", "2x2xf32"]
    assert there[1:3] == (rounds | dict(back="false", prepare_value="true"), types)
    assert there[3] == [*TYPES[:2], "2x2x80x384xf8E4M3FN", *scales]
    assert back[1:] == (
        rounds | dict(back="true", prepare_value="false"),
        types,
        types + scales,
    )
    assert forward[1]["operands"] == ("query", "key", "prepared_value", *DESCALES)
    assert forward[1]["window_right"] == "0 : i32"
    assert forward[2] == there[3]
    assert forward[3] == ["2x200x4x80xf16", "2x4x200xf32", "1xi32", "0xui8"]
    assert set(operations(lower(call, query, key, value, query))) == {"custom_call"}


def quantize_calls(query, key, value, **how):
    return custom_calls(lower(functools.partial(jax_fa3.quantize_qkv, **how), query, key, value))


@pytest.mark.parametrize("prepare", [False, True])
def test_quantize_qkv_is_one_call(prepare):
    arrays = [jax.ShapeDtypeStruct(s, "bfloat16") for s in (QUERY, KEY, VALUE)]
    lengths = jnp.array([3, 300], jnp.int32)
    how = dict(rotation_seed=7, prepare_value=prepare, key_value_seq_lengths=lengths)
    ((target, attributes, args, results),) = quantize_calls(*arrays, **how)
    assert target == "jax_fa3_quantize"
    assert attributes == ROUNDING | dict(
        operands=(*QKV, "key_value_seq_lengths"),
        seed="7 : ui32",
        back="false",
        prepare_value=str(prepare).lower(),
    )
    assert args == [f"2x{n}x80xbf16" for n in ("200x4", "300x2", "300x2")] + ["2xi32"]
    value = "2x2x80x384xf8E4M3FN" if prepare else TYPES[2]
    assert results == [*TYPES[:2], value, "2x4x2xf32", "2x2x3xf32", "2x2xf32"]
    unbatched = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in arrays]
    assert len(quantize_calls(*unbatched, return_saturated=True)) == 1
    query, key, value = arrays
    queries = jax.ShapeDtypeStruct((5, *QUERY), query.dtype)
    mapped = lower(jax.vmap(jax_fa3.quantize_qkv, in_axes=(0, None, None)), queries, key, value)
    assert [call[2][0] for call in custom_calls(mapped)] == ["10x200x4x80xbf16"]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "how"),
    [
        ("float32", 64, {}),
        ("bfloat16", 72, {}),
        ("bfloat16", 64, dict(granularity="head")),
        ("bfloat16", 64, dict(granularity="tensor")),
        ("bfloat16", 64, dict(rotation_seed=None)),
        ("bfloat16", 64, dict(value_descale=jnp.float32(1))),
    ],
    ids=str,
)
def test_what_quantize_qkv_leaves_to_xla(dtype, head_dim, how):
    assert quantize_calls(*operands(dtype, head_dim=head_dim), **how) == []


@pytest.mark.parametrize(("key_heads", "calls"), [(P(None, None, "model"), 1), (P(), 0)])
def test_quantize_qkv_in_a_shard_map(key_heads, calls):
    """One custom call, unless its results vary over mesh axes of their own."""
    query, key, value = operands(heads_q=8, heads_kv=2 if calls else 1)
    specs = (P(None, None, "model"), key_heads, key_heads)

    def arrays(*operands):
        return tuple(jax_fa3.quantize_qkv(*operands)[:3])

    mesh = mesh_of(AxisType.Auto, model=2)
    mapped = jax.shard_map(arrays, mesh=mesh, in_specs=specs, out_specs=specs)
    assert len(custom_calls(lower(mapped, query, key, value))) == calls


def test_quantize_qkv_of_no_rows_is_left_to_xla():
    assert quantize_calls(*operands(seqlen_k=0)) == []


def test_lengths_reach_the_rounding():
    query, key, value = (jax.ShapeDtypeStruct(s, "bfloat16") for s in (QUERY, KEY, VALUE))
    lengths = jax.ShapeDtypeStruct((2,), "int32")

    def call(query, key, value, lengths, offset):
        return dot_product_attention(
            query,
            key,
            value,
            key_value_seq_lengths=lengths,
            query_offset=offset,
            forward_dtype=FLOAT8,
        )

    text = lower(call, query, key, value, lengths, lengths)
    rounding, forward = custom_calls(text)
    assert rounding[1]["operands"] == (*QKV, "key_value_seq_lengths")
    assert rounding[2][3:] == ["2xi32"]
    assert re.search(r"@jax_fa3_quantize\(%arg0, %arg1, %arg2, %arg3\)", text)
    assert forward[2][6:] == ["2xi32", "2xi32"]


def test_vmap_in_float8_is_still_one_call():
    x = [jax.ShapeDtypeStruct((5, *a.shape), a.dtype) for a in float8_operands()]
    ((_, _, args, results),) = custom_calls(lower(jax.vmap(dot_product_attention), *x))
    assert args[0] == "10x200x4x80xf8E4M3FN" and args[3] == "10x4x1xf32"
    assert results[3] == f"{10 * 2 * 80 * 384}xui8"


def test_float8_calls_without_a_kernel_lower_to_xla():
    wide = [jax.ShapeDtypeStruct((1, 64, 2, 264), FLOAT8)] * 3
    assert "head_dim" in jax_fa3.is_supported(*wide)
    for x, options in ((wide, {}), (float8_operands(), dict(mask=jnp.ones((1, 1, 1, 300), bool)))):
        text = lower(functools.partial(dot_product_attention, **options), *x)
        assert custom_calls(text) == [] and "stablehlo.dot_general" in text


def test_float8_without_a_kernel_leaves_the_backward_pass_to_its_own():
    query, key, value = operands(head_dim=72)
    call = functools.partial(vector_jacobian, forward_dtype=FLOAT8)
    calls = custom_calls(lower(call, query, key, value, query))
    assert [call[0] for call in calls] == ["jax_fa3_backward"]
