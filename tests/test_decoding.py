"""What Python sends is what C++ decodes: the custom calls run on a CPU, as far as decoding.

The kernels' place is taken by tests/cpp/decode_library.cc, which has the handlers' own bindings and
tables, accepts or refuses, and computes nothing.
"""

import ctypes
import functools
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import mlir

from case import Case
from float8 import FLOAT8, quantised
from jax_fa3 import (
    create_block_mask,
    dot_product_attention,
    ffi,
    flex,
    flex_attention,
    quantize_qkv,
    route,
)
from jax_fa3.custom_call import custom_call
from jax_fa3.flex import link
from jax_fa3.operands import Operands, Sources
from jax_fa3.options import VisibilityOptions
from test_cpp import COMPILER, DECODING, ROOT, ffi_headers

SOURCES = ("tests/cpp/decode_library.cc", *DECODING)
TARGETS = (
    "jax_fa3_forward",
    "jax_fa3_forward_float8",
    "jax_fa3_backward",
    "jax_fa3_quantize",
    "jax_fa3_visibility",
    "jax_fa3_dense_mask",
    "jax_fa3_forward_cached",
    "jax_fa3_append",
    "jax_fa3_flex_forward",
    "jax_fa3_flex_backward",
)
CASES = (
    Case(seqlen_q=200, seqlen_k=300, heads_q=4, heads_kv=2, head_dim=80),
    Case(head_dim=192, head_dim_v=128, dtype="float16", causal=True, offset=7, scale=-0.2),
    Case(query_lengths=(65, 3), key_lengths=(0, 65), offset=(-3, 70), window=(9, 3)),
    Case(seqlen_q=1, seqlen_k=128, key_lengths=(128, 5), head_dim=128),
)

pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}"),
    pytest.mark.usefixtures("forward_kernel_alone"),
]


@pytest.fixture(scope="module")
def handlers(tmp_path_factory):
    """The targets, registered for the CPU."""
    library = tmp_path_factory.mktemp("decode") / "decode.so"
    flags = ["-std=c++17", "-shared", "-fPIC", "-Isrc", "-isystem", ffi_headers(), "-o", library]
    subprocess.run([COMPILER, *flags, *SOURCES], cwd=ROOT, check=True)
    loaded = ctypes.CDLL(str(library))
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")


@pytest.fixture
def attend(handlers, monkeypatch):
    """The public call, on "kernels" here."""
    monkeypatch.setattr(route, "device_reason", lambda: None)
    return functools.partial(dot_product_attention, implementation="fa3", return_residual=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("forward_dtype", (None, FLOAT8))
@pytest.mark.parametrize("mapped", (False, True), ids=("plain", "vmap"))
def test_sixteen_bit_inputs(attend, case, forward_dtype, mapped):
    *arrays, dout, dlse = case.inputs()

    def run(arrays, cotangents):
        call = functools.partial(attend, **case.options, **case.index_arrays)
        results, vjp = jax.vjp(functools.partial(call, forward_dtype=forward_dtype), *arrays)
        return results, vjp(cotangents)

    operands = jax.tree.map(jnp.asarray, (arrays, (dout, dlse)))
    if mapped:
        run, operands = jax.vmap(run), jax.tree.map(lambda x: jnp.stack([x] * 3), operands)
    jax.block_until_ready(jax.jit(run)(*operands))


DENSE = [  # the shapes of a bias and a mask in calls of 200 rows, 301 keys and 4 heads
    ((2, 4, 200, 301), None),
    ((1, 4, 1, 301), (2, 1, 1, 301)),
    ((1, 1, 200, 301), (1, 4, 200, 1)),
    (None, (1, 1, 200, 301)),
]


@pytest.mark.parametrize(("bias", "mask"), DENSE, ids=str)
@pytest.mark.parametrize("axes", (None, (0, None, None), (0, 0, 0), (None, 0, None)), ids=str)
def test_biases_and_masks(attend, bias, mask, axes):
    """With and without the bias' gradient; `axes` of query, bias and mask, mapped or not."""
    case = Case(seqlen_q=200, seqlen_k=301, heads_q=4, heads_kv=2, offset=(3, 120))
    query, *keys, dout, dlse = map(jnp.asarray, case.inputs())
    dense = [
        None if shape is None else jnp.ones(shape, dtype)
        for shape, dtype in ((bias, query.dtype), (mask, bool))
    ]

    def run(query, bias, mask):
        call = functools.partial(attend, **case.options, **case.index_arrays)
        _, vjp = jax.vjp(lambda *x: call(*x, bias, mask), query, *keys)
        of_all = jax.vjp(lambda *x: call(*x, mask), query, *keys, bias)[1]
        return vjp((dout, dlse)), of_all((dout, dlse))

    x = [query, *dense]
    if axes is not None:
        repeated = zip(x, axes, strict=True)
        x = [a if axis is None or a is None else jnp.stack([a] * 3) for a, axis in repeated]
        axes = [axis if a is not None else None for a, axis in zip(x, axes, strict=True)]
        run = jax.vmap(run, in_axes=axes) if any(axis == 0 for axis in axes) else run
    _, gradients = jax.block_until_ready(jax.jit(run)(*x))
    assert bias is None or gradients[3].shape[-4:] == bias


SCORES = (  # a bias' or mask's shape, and what else the call has
    (None, dict(sinks=True, return_max_logits=True)),
    ((2, 4, 200, 301), dict(sinks=True)),
    ((1, 1, 1, 301), dict(sinks=True, return_max_logits=True)),
    (None, dict(sinks=True, logits_soft_cap=30.0)),
    (None, dict(alibi_slopes=True, return_max_logits=True)),
)


@pytest.mark.parametrize(("bias", "given"), SCORES, ids=str)
@pytest.mark.parametrize("axes", (None, (0, None), (0, 0)), ids=str)
def test_sinks_and_slopes(attend, bias, given, axes):
    """With and without the gradients of a bias and of sinks; `axes` of query, and of sinks and
    slopes, mapped or not."""
    case = Case(seqlen_q=200, seqlen_k=301, heads_q=4, heads_kv=2, offset=(3, 120))
    query, *keys, dout, dlse = map(jnp.asarray, case.inputs())
    given, heads = dict(given), jnp.ones(4)
    names = [name for name in ("sinks", "alibi_slopes") if given.pop(name, False)]
    given["bias"] = None if bias is None else jnp.ones(bias, query.dtype)

    def run(query, heads):
        def call(sinks, *arrays):
            options = case.options | case.index_arrays | given | dict.fromkeys(names, heads)
            options |= dict(sinks=sinks) if "sinks" in names else {}
            return attend(*arrays, **options)[:2]

        _, vjp = jax.vjp(call, heads, query, *keys)
        of_keys = jax.vjp(functools.partial(call, heads), query, *keys)[1]
        return vjp((dout, dlse)), of_keys((dout, dlse))

    x = [query, heads]
    if axes is not None:
        x = [a if axis is None else jnp.stack([a] * 3) for a, axis in zip(x, axes, strict=True)]
        run = jax.vmap(run, in_axes=axes)
    gradients, _ = jax.block_until_ready(jax.jit(run)(*x))
    assert gradients[0].shape == ((4,) if axes is None else (3, 4))


def test_a_mask_has_one_table(attend):
    """XLA makes it once for all layers, forward and backward."""
    mask = jnp.ones((1, 1, 40, 40), bool)

    def loss(x):
        for _ in range(3):
            x, _ = attend(x, x, x, mask=mask)
        return jnp.sum(x.astype(jnp.float32))

    x = jax.ShapeDtypeStruct((2, 40, 4, 64), "bfloat16")
    text = jax.jit(jax.grad(loss)).lower(x).compile().as_text()
    names = ("dense_mask", "forward", "backward")
    counts = [text.count(f'custom_call_target="jax_fa3_{name}"') for name in names]
    assert counts == [1, 3, 3]


@pytest.fixture
def flex_attend(handlers, monkeypatch):
    """flex_attention on "kernels" here, which are not linked."""
    monkeypatch.setattr(route, "device_reason", lambda: None)
    monkeypatch.setattr(link, "why_not", lambda: None)
    monkeypatch.setattr(link, "linked", lambda *_: link.LinkedKernel("0" * 64, "f0VMRg=="))
    mlir.register_lowering(ffi._linked_call, ffi._lower, platform="cpu")
    return functools.partial(flex_attention, implementation="fa3", return_residual=True)


CAPTURED = [("float32", ()), ("bfloat16", (4,)), ("int32", (2, 300)), ("bool", (1, 2, 3, 4))]


@pytest.mark.parametrize("count", (0, 4, 8))
@pytest.mark.parametrize("states", (None, (1, 1), (2, 4), (2, 1)), ids=str)
@pytest.mark.parametrize("mapped", (False, True), ids=("plain", "vmap"))
def test_functions(flex_attend, count, states, mapped):
    """Captured arrays of any type and shape, and a block mask's states."""
    case = Case(seqlen_q=200, seqlen_k=300, heads_q=4, heads_kv=2, query_lengths=(65, 3))
    query, key, value, dout, dlse = map(jnp.asarray, case.inputs())
    captured = [jnp.zeros(shape, dtype) for dtype, shape in (2 * CAPTURED)[:count]]
    blocks = None if states is None else create_block_mask(flex.noop_mask, *states, 200, 300)

    def run(query, dout, dlse):
        def call(*x):
            options = case.index_arrays | dict(is_causal=True, block_mask=blocks)
            return flex_attend(*x, None, lambda b, h, i, j, *_: i < 9, captured, **options)

        results, vjp = jax.vjp(call, query, key, value)
        return results, vjp((dout, dlse))

    x = query, dout, dlse
    if mapped:
        run, x = jax.vmap(run), [jnp.stack([y] * 3) for y in x]
    jax.block_until_ready(jax.jit(run)(*x))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("granularity", ("block", "head"))
@pytest.mark.parametrize("prepare", (False, True), ids=("plain", "prepared"))
def test_float8_inputs(attend, case, granularity, prepare):
    x = quantize_qkv(*case.inputs()[:3], granularity=granularity, prepare_value=prepare)
    options = case.options | case.index_arrays | dict(value_is_prepared=prepare)
    jax.block_until_ready(attend(**x._asdict(), **options))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("how", ({}, dict(prepare_value=True, seed=2**32 - 1), dict(back=True)))
def test_rounding(handlers, case, how):
    names = dict(query_lengths="query_seq_lengths", key_lengths="key_value_seq_lengths")
    lengths = {field: case.index_arrays.get(name) for field, name in names.items()}
    call = jax.jit(functools.partial(ffi.quantize, **how))
    jax.block_until_ready(call(Operands(*case.inputs()[:3], **lengths)))


@pytest.mark.parametrize("seqlen", (1, 1024, 1025, 3000, 2**20 + 1))
@pytest.mark.parametrize("bytes_less", (0, 1), ids=("whole", "short"))
def test_table_of_visibility(handlers, monkeypatch, seqlen, bytes_less):
    """The workspace is as large as it must be, and no larger."""
    size = ffi.workspace_bytes
    monkeypatch.setattr(ffi, "workspace_bytes", lambda *shape: size(*shape) - bytes_less)
    options = VisibilityOptions(seqlen_q=seqlen, seqlen_k=7)
    call = jax.jit(functools.partial(ffi.visibility, options))
    sources = Sources(kv_start=jnp.zeros((2, 3, seqlen), jnp.int32))
    if not bytes_less:
        jax.block_until_ready(call(sources))
        return
    with pytest.raises(Exception, match="workspace must have .* bytes"):
        jax.block_until_ready(call(sources))


@pytest.mark.parametrize("shape", ((2, 3, 65, 100), (2, 1, 1, 257), (1, 1, 64, 4096), (1, 1, 0, 5)))
@pytest.mark.parametrize("words_less", (0, 1), ids=("whole", "short"))
def test_table_of_a_mask(handlers, monkeypatch, shape, words_less):
    words = ffi.dense_mask_words
    monkeypatch.setattr(ffi, "dense_mask_words", lambda *n: words(*n) - words_less)
    call = jax.jit(functools.partial(ffi.dense_mask))  # traced anew
    if not words_less:
        jax.block_until_ready(call(jnp.zeros(shape, bool)))
        return
    with pytest.raises(Exception, match="mask_table must have .* words"):
        jax.block_until_ready(call(jnp.zeros(shape, bool)))


def test_a_refusal_arrives(attend, monkeypatch):
    """That what decodes is what was sent: of other scales the call fails."""
    x = quantised(CASES[0])
    monkeypatch.setattr("jax_fa3.validate.check_arrays", lambda *_: None)
    with pytest.raises(Exception, match="query_descale must have 1 or 2 scales of a head"):
        x = x._replace(query_descale=np.ones((2, 4, 3), np.float32))
        jax.block_until_ready(attend(**x._asdict()))


# The custom calls over caches, written out: 3 sequences of 2 rows, 8 query heads, 2 kv heads.
CACHES = {"pskh": (9, 16, 2), "kpsh": (2, 9, 16), "pksh": (9, 2, 16), "skph": (16, 2, 9)}


def zeros(*shape, dtype="bfloat16"):
    return jnp.zeros(shape, dtype)


def attend_cached(layout, *, out_float32=False, value_dim=64, rows=2, **arrays):
    """`arrays` are the index arrays beside lengths and offsets, in the call's order."""
    fused = layout == "fused"
    options = dict(scale=np.float32(0.5), window_left=np.int32(2**30), window_right=np.int32(0))
    options |= dict(rescale_threshold=np.float32(8), sm_margin=np.int32(0))
    options |= dict(is_fused=fused, out_float32=out_float32)
    pages = () if "block_tables" in arrays else (3, 16)
    shape = (9, 16, 4) if fused else CACHES[layout]
    if pages:
        shape = tuple(3 if n == 9 else n for n in shape)
    caches = dict(key_cache=zeros(*shape, 64))
    if not fused:
        caches["value_cache"] = zeros(*shape, value_dim)
    value_dim = 64 if fused else value_dim
    results = dict(
        out=jax.ShapeDtypeStruct((6, 8, value_dim), "float32" if out_float32 else "bfloat16"),
        lse=jax.ShapeDtypeStruct((6, 8), "float32"),
        workspace=jax.ShapeDtypeStruct((0,), "uint8"),
        counters=jax.ShapeDtypeStruct((0,), "int32"),
    )
    index = dict.fromkeys(("key_lengths", "query_offset"), zeros(3, dtype="int32"))
    index |= {name: jnp.asarray(x, "int32") for name, x in arrays.items()}
    out = custom_call(
        "jax_fa3_forward_cached",
        dict(query=zeros(6, 8, 64)) | caches | index,
        results,
        options=options,
        layout="pskh" if fused else layout,
        rows_per_sequence=np.int32(rows),
    )
    return jax.block_until_ready(out)


@pytest.mark.parametrize("layout", (*CACHES, "fused"))
def test_attention_over_caches(handlers, layout):
    attend_cached(layout, value_dim=128, query_lengths=[1, 2, 2])
    attend_cached(
        layout, rows=0, out_float32=True, block_tables=np.zeros((3, 5)), query_starts=range(4),
        key_starts=[0, 1, 2],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("what", "arrays"),
    [
        ("layout must be pskh, kpsh, pksh or skph, got 'hksp'", dict(layout="hksp")),
        (r"query must have batch \* rows_per_sequence = 3 \* 4 rows, got 6", dict(rows=4)),
        ("rows_per_sequence must be 0 with query_starts.*got 2", dict(query_starts=range(4))),
        (r"query_starts must have shape \[4\], got \[3\]", dict(rows=0, query_starts=range(3))),
        (r"block_tables must have shape \[3, -1\], got \[2, 5\]",
         dict(block_tables=np.zeros((2, 5)))),
        (r"block_tables.shape\[1\] must be at most", dict(block_tables=np.zeros((3, 2**25)))),
    ],
)  # fmt: skip
def test_refusals_of_caches(handlers, monkeypatch, what, arrays):
    monkeypatch.setitem(CACHES, "hksp", CACHES["pskh"])
    with pytest.raises(Exception, match=what):
        attend_cached(**dict(layout="pskh") | arrays)


def append(layout, *, query=False, rotary=0, tables=False, rows=4, interleaved=False):
    fused = layout == "fused"
    pages = 9 if tables else 3
    shape = (pages, 16, rows) if fused else [pages if n == 9 else n for n in CACHES[layout]]
    caches = dict.fromkeys(("key_cache", "value_cache")[: 1 if fused else 2], zeros(*shape, 64))
    arrays = caches | dict.fromkeys(("key", "value"), zeros(3, 2, 2, 64))
    arrays |= dict(cache_lengths=zeros(3, dtype="int32"))
    arrays |= dict(block_tables=zeros(3, 5, dtype="int32")) if tables else {}
    cosines = zeros(7, rotary // 2, dtype="float32")
    arrays |= dict.fromkeys(("cos", "sin"), cosines) if rotary else {}
    arrays |= dict(query=zeros(3, 2, 8, 64)) if query else {}
    given = caches | (dict(query_out=arrays["query"]) if query else {})
    results = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in given.items()}
    out = custom_call(
        "jax_fa3_append",
        arrays,
        results,
        aliases={0: 0},
        layout="pskh" if fused else layout,
        is_fused=fused,
        is_interleaved=interleaved,
    )
    return jax.block_until_ready(out)


@pytest.mark.parametrize("layout", (*CACHES, "fused"))
def test_appending(handlers, layout):
    append(layout)
    append(layout, query=True, rotary=48, tables=True, interleaved=True)


@pytest.mark.parametrize(
    ("what", "arrays"),
    [
        ("rotary width must be a multiple of 16 up to head_dim = 64, got 24", dict(rotary=24)),
        ("rotary width must be a multiple of 16 up to head_dim = 64, got 80", dict(rotary=80)),
        (r"must have 2 \* 2 rows a slot, got 6", dict(layout="fused", rows=6)),
    ],
)
def test_refusals_of_an_append(handlers, what, arrays):
    with pytest.raises(Exception, match=what):
        append(**dict(layout="pskh") | arrays)
