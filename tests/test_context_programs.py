"""What the strategies compile to: which collectives, how many bytes, which kernel calls; and what
they refuse."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_fa3
from jax_fa3 import context_parallel
from jax_fa3.context_parallel import layout
from jax_fa3.operands import Operands
from jax_fa3.options import AttentionOptions
from meshes import PART, STRATEGIES, compiled_for, mesh_of
from programs import custom_calls, lower

DEVICES = 4
ROWS, HEADS, KV_HEADS, DIM = 32, 4, 2, 16  # of one device
QUERY, KEY = ROWS * HEADS * DIM, ROWS * KV_HEADS * DIM  # elements of one device's part
LSE = ROWS * HEADS

pytestmark = pytest.mark.usefixtures("forward_kernel_alone")


def operands(dtype):
    shapes = [(1, DEVICES * ROWS, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def programs(strategy, layout="contiguous", dtype="float32", **options):
    """(function, args) of the strategy over DEVICES: its forward pass, its backward pass alone."""
    options = dict(is_causal=True) | options
    attend = functools.partial(STRATEGIES[strategy], axis_name="seq", layout=layout, **options)
    mapped = jax.shard_map(attend, mesh=mesh_of(seq=DEVICES), in_specs=PART, out_specs=PART)
    x = operands(dtype)
    out, pullback = jax.eval_shape(lambda *x: jax.vjp(mapped, *x), *x)
    return (mapped, x), (lambda pullback, dout: pullback(dout), (pullback, out))


def collectives(function, args):
    """{name: [elements of each result]} of a program's collectives, after XLA's optimizations."""
    text = compiled_for(function, *args).as_text()
    found = {}
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for result, name in re.findall(rf"= (.*?) ({names})(?:-start)?\(", text):
        shapes = re.findall(r"\w+\[([\d,]*)\]", result)
        sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
        found.setdefault(name, []).append(sum(sizes))
    return {name: sorted(sizes) for name, sizes in found.items()}


KV = 2 * KEY  # keys and values in one exchange
RING = [KV, KV, 2 * KV, KV, KV]  # two keys; the third with the first gradients; two gradients
HALVES = [KV // 2, QUERY // 2, (QUERY + LSE) // 2]  # keys and values; query; out and lse
BACKWARD_HALVES = [  # query, out, dout and lse; keys and values; the gradients
    *[(3 * QUERY + LSE) // 2, KV // 2],
    *[QUERY // 2, KV // 2],
]


@pytest.mark.parametrize(
    ("strategy", "layout", "options", "forward", "backward"),
    [
        ("ring", "zigzag", {}, [KV] * 3, RING),
        ("ring", "contiguous", {}, [KV] * 3 + HALVES, RING + BACKWARD_HALVES),
        ("ring", "contiguous", dict(is_causal=False), [KV] * 3, RING),
        ("ring", "contiguous", dict(local_window_size=ROWS // 2), [KV], [KV] * 2),
        (
            "ring",
            "contiguous",
            dict(local_window_size=ROWS + 2),
            [KV] * 2,
            [KV] * 4,
        ),
        ("allgather", "zigzag", {}, [], []),
        ("allgather", "contiguous", {}, HALVES[1:], [BACKWARD_HALVES[0], QUERY // 2]),
        ("allgather", "contiguous", dict(local_window_size=2), [], []),
    ],
    ids=str,
)
def test_permutes(strategy, layout, options, forward, backward):
    """The ring's permutes, keys and values in one; halves traded for contiguous causal parts."""
    (found, found_backward) = (collectives(*x) for x in programs(strategy, layout, **options))
    assert found.pop("collective-permute", []) == sorted(forward)
    assert found_backward.pop("collective-permute", []) == sorted(backward)
    if strategy == "allgather":
        sizes = [KEY, KEY] if "local_window_size" in options else [KV]
        assert found == {"all-gather": [DEVICES * size for size in sizes]}
        assert found_backward == found | {"reduce-scatter": sizes}
    else:
        assert found == found_backward == {}


def test_exchanges_of_ulysses():
    """Query, keys, values (as many heads as devices) and out; all and their gradients."""
    found, found_backward = (collectives(*x) for x in programs("ulysses"))
    assert {*found} == {*found_backward} == {"all-to-all"}
    assert sum(found["all-to-all"]) == 4 * QUERY + LSE
    assert sum(found_backward["all-to-all"]) == 8 * QUERY + LSE


@pytest.mark.parametrize(
    ("strategy", "layout", "options", "count"),
    [
        ("ring", "zigzag", {}, 4),
        ("ring", "contiguous", {}, 4),
        ("ring", "contiguous", dict(local_window_size=2), 2),
        ("ring", "contiguous", dict(is_causal=False), 4),
        ("ring", "zigzag", dict(is_causal=False), 4),
        ("ring", "zigzag", dict(local_window_size=2), 3 + 2),  # own; neighbours in the sequence
        ("allgather", "zigzag", {}, (3, 4)),
        ("allgather", "zigzag", dict(is_causal=False), (2, 3)),
        ("allgather", "contiguous", {}, 5),
        ("allgather", "contiguous", dict(is_causal=False), (2, 3)),
        ("allgather", "contiguous", dict(local_window_size=2), 1),
        ("ulysses", "contiguous", {}, 1),
    ],
    ids=str,
)
def test_kernel_calls(strategy, layout, options, count):
    """For CUDA: one call a step, in both directions; the steps of a causal ring without a mask."""
    both = programs(strategy, layout, "bfloat16", **options)
    counts = count if isinstance(count, tuple) else (count, count)
    for direction, count, (function, args) in zip(
        ("forward", "backward"), counts, both, strict=True
    ):
        calls = custom_calls(lower(function, *args))
        assert [call[0] for call in calls] == [f"jax_fa3_{direction}"] * count
        if strategy == "ring" and count == 4 and not options:
            own, *others = (call[1] for call in calls)
            lengths = "query_seq_lengths"
            assert own["window_right"] == "0 : i32" and lengths not in own["operands"]
            assert {call["window_right"] for call in others} == {"1073741824 : i32"}
            assert all(lengths in call["operands"] for call in others)


def shard_mapped(function, size=2):
    spec = P(None, "seq")
    return jax.shard_map(function, mesh=mesh_of(seq=size), in_specs=spec, out_specs=spec)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(axis_name="rows"), ValueError, "axis_name is 'rows'; expected a mesh axis that is"),
        (dict(layout="spiral"), ValueError, "layout is 'spiral'; expected one of"),
        (dict(layout="zigzag"), ValueError, "query has seq = 3 on each device; expected an even"),
        (dict(scale="a"), TypeError, "scale is 'a'; expected a Python number"),
        (dict(local_window_size=-1), ValueError, "local_window_size is -1"),
        (dict(query_seq_lengths=jnp.ones(3, jnp.int32)), ValueError, "query_seq_lengths has shape"),
        (dict(implementation="fa3"), NotImplementedError, "implementation is 'fa3'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_refusals(strategy, options, error, message):
    x = jnp.zeros((2, 6, 4, 8))
    attend = functools.partial(STRATEGIES[strategy], **dict(axis_name="seq") | options)
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(shard_mapped(attend), x, x, x)


def test_ulysses_refuses_heads_it_cannot_divide():
    x = jnp.zeros((2, 6, 3, 8))
    attend = functools.partial(jax_fa3.ulysses_attention, axis_name="seq")
    with pytest.raises(ValueError, match="query has 3 heads; expected a multiple of the 2 devices"):
        jax.eval_shape(shard_mapped(attend), x, x, x)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_zigzag_orders(axis):
    x = np.moveaxis(np.arange(48).reshape(12, 2, 2), 0, axis)
    permuted = jax_fa3.zigzag_permute(x, axis, 3)
    chunks = np.moveaxis(permuted, axis, 0)[::2, 0, 0] // 8
    assert chunks.tolist() == [0, 5, 1, 4, 2, 3]
    assert (jax_fa3.zigzag_unpermute(permuted, axis, 3) == x).all()
    for function in (jax_fa3.zigzag_permute, jax_fa3.zigzag_unpermute):
        with pytest.raises(ValueError, match=r"has extent 12; expected a multiple of 2 \* num_dev"):
            function(x, axis, 4)


@pytest.mark.parametrize("axis", [0, -1])
def test_striped_orders(axis):
    x = np.moveaxis(np.arange(3072).reshape(1536, 2), 0, axis)
    permuted = jax_fa3.striped_permute(x, axis, 3)
    stripes = np.moveaxis(permuted, axis, 0)[::256, 0] // 512
    assert stripes.tolist() == [0, 3, 1, 4, 2, 5]
    assert (jax_fa3.striped_unpermute(permuted, axis, 3) == x).all()
    for function in (jax_fa3.striped_permute, jax_fa3.striped_unpermute):
        with pytest.raises(ValueError, match=r"has extent 1536; expected a multiple of 256 \* num"):
            function(x, axis, 4)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_mirrored_rows_come_back(size):
    """mirror and unmirror are inverse; mirrored rows are the chunks that chunk_table names."""
    axis_table = layout.chunk_table("mirrored", size)

    def there(x):
        return layout.Axis.bound("seq").mirror(x, 1)

    def back(x):
        return layout.Axis.bound("seq").unmirror(x, 1)

    x = jnp.arange(2 * size)[None]
    mirrored = shard_mapped(there, size)(x)
    assert mirrored[0].tolist() == axis_table.T.ravel().tolist()
    assert (axis_table[0] < axis_table[1]).all()
    assert (shard_mapped(back, size)(mirrored) == x).all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "options", "expected"),
    [
        (32, 8, 8192, {}, "allgather"),
        (32, 8, 1 << 17, {}, "allgather"),  # a million tokens on eight devices
        (32, 8, 1 << 18, {}, "ring"),  # too many to gather
        (32, 32, 8192, {}, "ring"),  # keys as large as queries
        (32, 8, 8192, dict(window_left=20_000, window_right=0), "ring"),  # few steps
        (32, 8, 8192, dict(window_left=40_000, window_right=0), "allgather"),
    ],
)
def test_choice(heads, kv_heads, rows, options, expected):
    query, key = (jax.ShapeDtypeStruct((1, rows, h, 128), "bfloat16") for h in (heads, kv_heads))
    options = AttentionOptions(scale=1.0, **options)
    assert context_parallel.choose(options, Operands(query, key, key), 8) == expected


@pytest.mark.parametrize(
    ("heads", "kv_heads", "array", "expected"),
    [
        (32, 32, "visibility", "allgather"),  # whose steps may see nothing
        (32, 8, "alibi_slopes", "allgather"),
        (32, 16, "alibi_slopes", "ring"),  # which hides its permutes
    ],
)
def test_choice_by_arrays(heads, kv_heads, array, expected):
    query, key = (jax.ShapeDtypeStruct((1, 8192, h, 128), "bfloat16") for h in (heads, kv_heads))
    operands = Operands(query, key, key, **{array: jax.ShapeDtypeStruct((1, heads), "float32")})
    assert context_parallel.choose(AttentionOptions(scale=1.0), operands, 8) == expected
