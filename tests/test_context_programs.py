"""What the strategies compile to: which collectives, how many bytes, which kernel calls; and what
they refuse."""

import functools
import math
import re

import jax
import pytest

from test_context import FUNCTIONS, PART, compiled, mesh_of

DEVICES = 4
ROWS, HEADS, KV_HEADS, DIM = 32, 4, 2, 16  # of one device
QUERY, KEY = ROWS * HEADS * DIM, ROWS * KV_HEADS * DIM  # elements of one device's part
LSE = ROWS * HEADS


def operands(dtype="bfloat16"):
    shapes = [(1, DEVICES * ROWS, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def mapped(strategy, layout="contiguous", **options):
    """The strategy's function over DEVICES, and the gradient of its out and lse."""
    attend = functools.partial(
        FUNCTIONS[strategy], axis_name="seq", layout=layout, is_causal=True, **options
    )
    mesh = mesh_of(seq=DEVICES)
    forward = jax.shard_map(attend, mesh=mesh, in_specs=PART, out_specs=PART)

    def gradient(query, key, value):
        out, vjp = jax.vjp(attend, query, key, value)
        return vjp(out)

    return forward, jax.shard_map(gradient, mesh=mesh, in_specs=PART, out_specs=PART)


def collectives(function):
    """{name: [elements of each result]} of a program's collectives, after XLA's optimizations."""
    text = compiled(function, *operands("float32")).as_text()
    found = {}
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for result, name in re.findall(rf"= (.*?) ({names})(?:-start)?\(", text):
        shapes = re.findall(r"\w+\[([\d,]*)\]", result)
        sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
        found.setdefault(name, []).append(sum(sizes))
    return {name: sorted(sizes) for name, sizes in found.items()}


KV = 2 * KEY  # keys and values in one permute
HALVES = [LSE // 2, KV // 2, QUERY // 2, QUERY // 2]  # lse; keys and values; query, out
BACKWARD_HALVES = [  # lse; query, out and dout at once; keys and values; the gradients
    *[LSE // 2, 3 * QUERY // 2, KV // 2],
    *[QUERY // 2, KV // 2],
]


@pytest.mark.parametrize(
    ("strategy", "layout", "options", "forward", "backward"),
    [
        ("ring", "zigzag", {}, [KV] * 3, [KV] * 6),
        ("ring", "contiguous", {}, [KV] * 3 + HALVES, [KV] * 6 + BACKWARD_HALVES),
        ("ring", "contiguous", dict(is_causal=False), [KV] * 3, [KV] * 6),
        ("ring", "contiguous", dict(local_window_size=ROWS // 2), [KV], [KV] * 2),
        ("ring", "contiguous", dict(local_window_size=ROWS + 2), [KV] * 2, [KV] * 4),
        ("allgather", "zigzag", {}, [], []),
        (
            "allgather",
            "contiguous",
            {},
            [HALVES[0], *HALVES[2:]],
            [*BACKWARD_HALVES[:2], QUERY // 2],
        ),
    ],
    ids=str,
)
def test_permutes(strategy, layout, options, forward, backward):
    """The ring's permutes, keys and values in one; halves traded for contiguous causal parts. The
    gradient's program has the forward pass in it."""
    found = [collectives(function) for function in mapped(strategy, layout, **options)]
    permutes = [x.pop("collective-permute", []) for x in found]
    assert permutes[0] == sorted(forward)
    assert permutes[1] == sorted([*forward, *backward])
    if strategy == "allgather":
        gathered = [KEY * DEVICES] * 2
        assert found[0] == {"all-gather": gathered}
        assert found[1].pop("reduce-scatter") == [KEY] * 2
        assert sorted({*found[1]}) == ["all-gather"]
        assert set(found[1]["all-gather"]) == {KEY * DEVICES}
    else:
        assert found == [{}, {}]
