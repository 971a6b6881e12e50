"""What calls over caches become for CUDA: operands, results, attributes and aliases, lowered on a
machine that needs no GPU."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa3
from jax_fa3 import append_to_cache, cached_attention, dot_product_attention, native
from jax_fa3.cached import few_rows
from jax_fa3.operands import Operands
from jax_fa3.options import AttentionOptions
from programs import custom_calls

ARRAYS = "query", "key_cache", "value_cache", "key_lengths", "query_offset"
INDICES = "cache_lengths", "block_tables", "new_lengths"
PLAN = dict(workspace_bytes=4096, counters=66)
B, T, N, K, H, HV, P, S, M = 3, 2, 8, 2, 64, 64, 20, 16, 5


@pytest.fixture(autouse=True)
def plans(monkeypatch):
    """A build that has the kernels, as far as tracing knows; yields the calls that asked it."""
    asked = []

    def plan(dtype, sizes, has_block_tables):
        asked.append((dtype, sizes, has_block_tables))
        if has_block_tables and sizes.page_size % 8:
            raise ValueError(
                f"the kernels take pages of a multiple of 8 slots, not {sizes.page_size}"
            )
        return PLAN

    monkeypatch.setattr(native, "IMPORT_ERROR", None)
    monkeypatch.setattr(native, "plan_forward_cached", plan)
    return asked


def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def ints(*shape):
    return array(*shape, dtype="int32")


def lower(function, *x, donate=()):
    traced = jax.jit(function, donate_argnums=donate).trace(*x)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def aliases(text):
    """[(result, operand)] of each custom call's results that stand in the memory of operands."""
    lines = [line for line in text.splitlines() if "custom_call @jax_fa3_" in line]
    alias = r"output_tuple_indices = \[(\d*)\], operand_index = (\d+)"
    return [re.findall(alias, line) for line in lines]


CACHES = (array(P, S, K, H), array(P, S, K, HV))
PAGED = dict(cache_lengths=ints(B), block_tables=ints(B, M))


def by_name(function, *arrays, **given):
    """lower(function) of arrays by position and by name."""
    names = list(given)

    def run(*x):
        named = dict(zip(names, x[len(arrays) :], strict=True))
        return function(*x[: len(arrays)], **named)

    return lower(run, *arrays, *given.values())


def test_attention():
    run = functools.partial(cached_attention, local_window_size=(7, 0), scale=0.5)
    text = by_name(run, array(B, T, N, H), *CACHES, **PAGED, key_starts=ints(B))
    ((target, attributes, operands, results),) = custom_calls(text)
    assert target == "jax_fa3_forward_cached" and aliases(text) == [[]]
    tokens = B * T
    assert operands == [
        f"{tokens}x{N}x{H}xbf16",
        f"{P}x{S}x{K}x{H}xbf16",
        f"{P}x{S}x{K}x{HV}xbf16",
        f"{B}xi32",
        f"{B}xi32",
        f"{B}x{M}xi32",
        f"{B}xi32",
    ]
    assert results == [f"{tokens}x{N}x{HV}xbf16", f"{tokens}x{N}xf32", "4096xui8", "66xi32"]
    assert attributes == dict(
        scale="5.000000e-01 : f32",
        window_left="7 : i32",
        window_right="0 : i32",
        rescale_threshold="8.000000e+00 : f32",
        sm_margin="0 : i32",
        operands=(*ARRAYS, "block_tables", "key_starts"),
        results=("out", "lse", "workspace", "counters"),
        is_fused="false",
        out_float32="false",
        layout='"pskh"',
        rows_per_sequence=f"{T} : i32",
    )


def test_ragged_queries_and_a_fused_cache():
    run = functools.partial(cached_attention, layout="fused", out_dtype="float32", sm_margin=4)
    given = dict(PAGED, query_starts=ints(B + 1))
    text = by_name(
        lambda q, kv, **x: run(q, kv, None, **x), array(17, N, H), array(P, S, 2 * K, H), **given
    )
    ((_, attributes, operands, results),) = custom_calls(text)
    assert operands[:2] == [f"17x{N}x{H}xbf16", f"{P}x{S}x{2 * K}x{H}xbf16"]
    assert operands[2:] == [f"{B}xi32"] * 2 + [f"{B}x{M}xi32", f"{B + 1}xi32"]
    assert results[0] == f"17x{N}x{H}xf32"
    true = {name for name, x in attributes.items() if x == "true"}
    assert true == {"is_fused", "out_float32"}
    names = [name for name in ARRAYS if name != "value_cache"]
    assert attributes["operands"] == (*names, "block_tables", "query_starts")
    assert attributes["rows_per_sequence"] == "0 : i32" and attributes["sm_margin"] == "4 : i32"
    assert attributes["layout"] == '"pskh"'


def test_a_decode_step_is_two_calls():
    """One row, no window: nothing is computed for positions that no row asks for, and nothing but
    the sum of lengths and one stands beside the calls."""
    new = array(B, 1, K, H)
    run = functools.partial(cached_attention)
    text = by_name(run, array(B, 1, N, H), *CACHES, new, new, **PAGED)
    append, attend = custom_calls(text)
    assert append[0] == "jax_fa3_append" and attend[0] == "jax_fa3_forward_cached"
    assert aliases(text) == [[("0", "0"), ("1", "1")], []]
    assert attend[1]["window_right"] == f"{2**30} : i32"
    operations = set(re.findall(r"= \"?stablehlo\.(\w+)", text))
    assert operations - {"case", "constant", "custom_call", "broadcast_in_dim", "reshape"} == {
        "add",
        "convert",
        "maximum",
        "minimum",
    }


@pytest.mark.parametrize("layout", ("kpsh", "fused"))
def test_append(layout):
    cos = array(100, 16, dtype="float32")
    shape = (K, P, S, H) if layout == "kpsh" else (P, S, 2 * K, H)
    key_cache, new = array(*shape), array(B, T, K, H)
    value_cache = key_cache if layout == "kpsh" else None

    def run(cache, new, cos, query, **index):
        rotary = jax_fa3.Rotary(cos, cos, interleaved=True)
        caches = cache, None if value_cache is None else cache + 1
        return append_to_cache(
            *caches, new, new, rotary=rotary, query=query, layout=layout, **index
        )

    given = dict(PAGED, new_lengths=ints(B))
    text = by_name(run, key_cache, new, cos, array(B, T, N, H), **given)
    ((target, attributes, operands, results),) = custom_calls(text)
    assert target == "jax_fa3_append"
    caches = ["x".join(map(str, shape)) + "xbf16"] * (2 if layout == "kpsh" else 1)
    tokens = [f"{B}x{T}x{K}x{H}xbf16"] * 2
    index = [f"{B}xi32", f"{B}x{M}xi32", f"{B}xi32"]
    query = f"{B}x{T}x{N}x{H}xbf16"
    assert operands == [*caches, *tokens, *index, "100x16xf32", "100x16xf32", query]
    assert results == [*caches, query]
    assert aliases(text) == [[(str(i), str(i)) for i in range(len(caches))]]
    names = ("key_cache", "value_cache")[: len(caches)]
    assert attributes == dict(
        operands=(*names, "key", "value", *INDICES, "cos", "sin", "query"),
        results=(*names, "query_out"),
        is_fused="true" if layout == "fused" else "false",
        is_interleaved="true",
        layout='"kpsh"' if layout == "kpsh" else '"pskh"',
    )


def test_an_unmapped_cache_is_shared():
    """Contiguous, it becomes pages; in any other way a copy for each mapped call would be made."""
    cache, lengths = array(B, 64, K, H), ints(B)
    run = jax.vmap(
        lambda q, k, v, n: cached_attention(q, k, v, cache_lengths=n), (0, None, None, None)
    )
    ((_, attributes, operands, *_),) = custom_calls(
        lower(run, array(4, B, T, N, H), cache, cache, lengths)
    )
    assert operands[:3] == [f"{4 * B * T}x{N}x{H}xbf16"] + [f"{B}x64x{K}x{H}xbf16"] * 2
    assert attributes["operands"] == (*ARRAYS, "block_tables")
    odd = array(B, 63, K, H)  # no pages of the kernels: repeated
    ((_, attributes, operands, *_),) = custom_calls(
        lower(run, array(4, B, T, N, H), odd, odd, lengths)
    )
    assert operands[1] == f"{4 * B}x63x{K}x{H}xbf16" and attributes["operands"] == ARRAYS


def test_reasons(plans, monkeypatch):
    run = functools.partial(cached_attention, implementation="fa3")
    with pytest.raises(NotImplementedError, match="no NVIDIA GPU"):
        by_name(run, array(B, T, N, H), *CACHES, **PAGED)
    monkeypatch.setattr(jax_fa3.route, "device_reason", lambda: None)
    assert custom_calls(by_name(run, array(B, T, N, H), *CACHES, **PAGED))
    assert plans[0] == ("bfloat16", (B, B * T, T, N, K, H, HV, P, S, M), True)
    small = array(P, 4, K, H)
    with pytest.raises(NotImplementedError, match="pages of a multiple of 8 slots, not 4"):
        by_name(run, array(B, T, N, H), small, small, **PAGED)
    floats = [array(*x.shape, dtype="float32") for x in (array(B, T, N, H), *CACHES)]
    with pytest.raises(NotImplementedError, match="caches of bfloat16 or float16, not float32"):
        by_name(run, *floats, **PAGED)
    with pytest.raises(NotImplementedError, match="scales of at least"):
        by_name(functools.partial(run, scale=1e-35), array(B, T, N, H), *CACHES, **PAGED)
    text = by_name(functools.partial(cached_attention), array(B, T, N, H), small, small, **PAGED)
    assert not custom_calls(text)


def test_reason_without_the_kernels(monkeypatch):
    monkeypatch.undo()
    if native.module() is not None:
        pytest.skip("there is a module")
    x = jnp.zeros((1, 8, 1, 16), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="no extension module"):
        append_to_cache(x, x, x, x, cache_lengths=np.zeros(1, np.int32), implementation="fa3")


# ---- dot_product_attention with few rows


def targets(*x, **options):
    def run(*x):
        out, vjp = jax.vjp(lambda *x: dot_product_attention(*x, **options), *x)
        return out, vjp(out)

    return [target for target, *_ in custom_calls(lower(run, *x))]


QUERY, KEYS = array(B, T, N, H), array(B, 600, K, H)
FORWARD, CACHED, BACKWARD = "jax_fa3_forward", "jax_fa3_forward_cached", "jax_fa3_backward"


def test_few_rows_take_the_kernel_of_caches():
    """Whose lse the gradient takes; offsets and lengths go with them."""
    lengths = np.array([3, 50, 100], np.int32)
    given = dict(is_causal=True, query_offset=7, key_value_seq_lengths=lengths)
    assert targets(QUERY, KEYS, KEYS, **given) == [CACHED, BACKWARD]
    text = lower(functools.partial(dot_product_attention, **given), QUERY, KEYS, KEYS)
    ((_, attributes, operands, results),) = custom_calls(text)
    keys = f"{B}x600x{K}x{H}xbf16"
    assert operands == [f"{B * T}x{N}x{H}xbf16", keys, keys, f"{B}xi32", f"{B}xi32"]
    assert results[:2] == [f"{B * T}x{N}x{H}xbf16", f"{B * T}x{N}xf32"]
    assert attributes["rows_per_sequence"] == f"{T} : i32"
    assert attributes["window_right"] == "0 : i32"
    assert targets(QUERY, KEYS, KEYS, query_seq_lengths=lengths) == [CACHED, BACKWARD]


def test_what_else_takes_the_forward_kernel():
    many = array(B, 33, N, H)  # 33 rows of 4 heads
    assert targets(many, KEYS, KEYS) == [FORWARD, BACKWARD]
    few_keys = array(B, 500, K, H)
    assert targets(QUERY, few_keys, few_keys) == [FORWARD, BACKWARD]
    bias = jnp.zeros((1, 1, T, 600), jnp.bfloat16)
    assert targets(QUERY, KEYS, KEYS, bias=bias)[0] == FORWARD
    assert FORWARD in targets(QUERY, KEYS, KEYS, mask=bias == 0)
    assert FORWARD in targets(QUERY, KEYS, KEYS, kv_end=np.ones((B, T), np.int32))


@pytest.mark.parametrize(("batch", "first"), ((8, CACHED), (64, FORWARD)))
def test_more_than_a_block_of_rows_only_where_the_forward_kernel_has_few_tiles(batch, first):
    query, keys = array(batch, 24, N, H), array(batch, 600, N // 4, H)
    assert targets(query, keys, keys)[0] == first


def test_a_choice_that_is_unknown_keeps_the_forward_kernel(plans):
    """One that this package may get: the kernels of caches must not drop it."""

    @dataclasses.dataclass(frozen=True)
    class More(AttentionOptions):
        cap: float = 0.0

    x = jnp.zeros((1, 2, 2, 64), jnp.bfloat16)
    assert few_rows.forward(More(scale=1.0, cap=0.5), Operands(x, x, x)) is None
    assert not plans


def test_a_plan_that_refuses_keeps_the_forward_kernel(monkeypatch):
    def refuse(*call):
        raise ValueError("no kernel")

    monkeypatch.setattr(native, "plan_forward_cached", refuse)
    assert targets(QUERY, KEYS, KEYS) == [FORWARD, BACKWARD]
