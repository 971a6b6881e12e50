"""What is added to the tables arrives: a static option and arrays that the package does not know.

None of it stands in the package: the test's own records extend Arguments, AttentionOptions and
Operands by a line for each, and mask.visible by their meaning. Everything that carries a call, from
the public record to the custom calls and XLA's implementation, takes them from there.

    row_end         a row sees the keys before it
    head_row_end    the same for each query head
    key_mark        a key is seen if its mark is at least ...
    least_mark      ... this, a static option
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_fa3 import api, dot_product_attention, mask
from jax_fa3.arguments import Arguments
from jax_fa3.context_parallel import Divided, public
from jax_fa3.operands import Operands, row
from jax_fa3.options import AttentionOptions
from meshes import LAYOUTS, PART, STRATEGIES, both_kinds, in_layout, mesh_of, place, run
from modes import MODES
from programs import custom_calls, lower

BATCH, SEQLEN, HEADS, KV_HEADS, DIM = 4, 32, 4, 2, 16
LEAST_MARK = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NewOperands(Operands):
    row_end: jax.Array | None = row("bs", "int32", counts="keys")
    head_row_end: jax.Array | None = row("bhs", "int32", counts="keys")
    key_mark: jax.Array | None = row("bt", "int32")


@dataclasses.dataclass(frozen=True)
class NewOptions(AttentionOptions):
    least_mark: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class NewArguments(Arguments):
    row_end: Any = None
    head_row_end: Any = None
    key_mark: Any = None
    least_mark: Any = 0

    Options = NewOptions
    Operands = NewOperands


@pytest.fixture(autouse=True)
def meaning(monkeypatch):
    known = mask.visible

    def visible(options, operands, row, column):
        terms = [known(options, operands, row, column)]
        if not isinstance(operands, NewOperands):
            return terms[0]
        if operands.row_end is not None:
            terms.append(column < operands.row_end[:, None, :, None])
        if operands.head_row_end is not None:
            terms.append(column < operands.head_row_end[..., None])
        if operands.key_mark is not None:
            terms.append(operands.key_mark[:, None, None, :] >= options.least_mark)
        return functools.reduce(jnp.logical_and, [x for x in terms if x is not None])

    monkeypatch.setattr(mask, "visible", visible)


def inputs(dtype="bfloat16"):
    """query, key, value and the cotangent; row_end, head_row_end and key_mark."""
    random = np.random.default_rng(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    arrays = [random.normal(size=(BATCH, SEQLEN, h, DIM)).astype(dtype) for h in heads]
    ends = [
        random.integers(-3, SEQLEN + 9, shape)
        for shape in ((BATCH, SEQLEN), (BATCH, HEADS, SEQLEN))
    ]
    marks = random.integers(0, 9, (BATCH, SEQLEN))
    return *arrays, *(x.astype("int32") for x in (*ends, marks))


def results(attend, query, key, value, dout, *new):
    """Output, LSE (-inf made a number) and gradients."""

    def both(*x):
        out, lse = attend(*x, *new)
        return out, jnp.where(jnp.isneginf(lse), -1.0, lse)

    (out, lse), vjp = jax.vjp(both, query, key, value)
    return out, lse, *vjp((dout, jnp.sin(lse)))


def arguments(query, key, value, row_end, head_row_end, key_mark, **options):
    new = dict(row_end=row_end, head_row_end=head_row_end, key_mark=key_mark, least_mark=LEAST_MARK)
    return NewArguments(query, key, value, return_residual=True, **new, **options)


def attend(*x, **options):
    return api.attention(arguments(*x, **options))


def attend_densely(query, key, value, row_end, head_row_end, key_mark, **options):
    """The same by way of a dense mask."""
    column = jnp.arange(SEQLEN)
    visible = (
        (column < row_end[:, None, :, None])
        & (column < head_row_end[..., None])
        & (key_mark >= LEAST_MARK)[:, None, None]
    )
    return dot_product_attention(query, key, value, mask=visible, return_residual=True, **options)


@functools.cache
def expected(**options):
    return run(functools.partial(results, functools.partial(attend_densely, **options)), *inputs())


def near(got, want):
    """As far as bfloat16 goes: one key too many or too few makes ten times the difference."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = (np.asarray(x).astype(np.float32) for x in (g, w))
        assert np.linalg.norm(g - w) <= 1e-2 * np.linalg.norm(w)


OPTIONS = ({}, dict(is_causal=True), dict(local_window_size=(9, 4)))


@pytest.mark.parametrize("implementation", (None, "xla"))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_jit(options, implementation):
    call = functools.partial(attend, implementation=implementation, **options)
    near(run(functools.partial(results, call), *inputs()), expected(**options))


@pytest.mark.parametrize(
    "axes", [(0,) * 7, (0, None, None, 0, None, 1, None), (None, 0, 0, 0, 0, None, 1)]
)
def test_vmap(axes):
    """Each case of the batch by itself, or with others of its own."""
    x = inputs()
    call = functools.partial(results, functools.partial(attend, is_causal=True))
    stacked = [
        a if axis is None else jnp.stack([a, jnp.roll(a, 1, 1)], axis)
        for a, axis in zip(x, axes, strict=True)
    ]
    got = run(jax.vmap(call, in_axes=axes), *stacked)
    dense = functools.partial(results, functools.partial(attend_densely, is_causal=True))
    for i in range(2):
        one = [
            a if axis is None else jnp.take(a, i, axis)
            for a, axis in zip(stacked, axes, strict=True)
        ]
        near([g[i] for g in got], run(dense, *one))


def test_scan_of_remat():
    def layers(attend, query, key, value, dout, *new):
        def layer(query, _):
            return attend(query, key, value, *new)[0], None

        def all_layers(query):
            return jax.lax.scan(jax.checkpoint(layer), query, None, length=2)[0]

        return jax.vjp(all_layers, query)[1](dout)

    near(*(run(functools.partial(layers, f), *inputs()) for f in (attend, attend_densely)))


HEADS_SPLIT = (P("data", None, "model"),) * 4 + (P("data"), P("data", "model"), P("data"))


@pytest.mark.parametrize("mode", MODES)
def test_mesh(mode):
    """Batch and heads split, by every kind of mesh axis."""
    kinds, manual = MODES[mode]
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds, devices=jax.devices()[:4])
    call = functools.partial(results, attend)
    if manual:

        def of_manual(spec):
            return P(*(name if name in manual else None for name in spec))

        call = jax.shard_map(
            call,
            mesh=mesh,
            in_specs=tuple(map(of_manual, HEADS_SPLIT)),
            out_specs=of_manual(HEADS_SPLIT[0]),
            axis_names=manual,
        )
    with jax.set_mesh(mesh):
        near(run(call, *place(mesh, inputs(), HEADS_SPLIT)), expected())


ROWS_SPLIT = (PART,) * 4 + (PART, P(None, None, "seq"), PART)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@both_kinds
def test_split_sequence(kind, strategy, options):
    mesh = mesh_of(kind, seq=4)
    call = functools.partial(
        results, functools.partial(attend, sequence_parallel=strategy, **options)
    )
    with jax.set_mesh(mesh):
        near(run(call, *place(mesh, inputs(), ROWS_SPLIT)), expected(**options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_divided_sequence(strategy, layout, options):
    """In a shard_map; each step has its own part of every array, counted from where it starts."""

    def divided(*x):
        return public.attention(arguments(*x, **options), strategy, "seq", layout)

    mapped = jax.shard_map(
        functools.partial(results, divided),
        mesh=mesh_of(seq=4),
        in_specs=ROWS_SPLIT,
        out_specs=PART,
    )

    def laid(x, inverse=False):
        return in_layout(layout, 4, x, inverse)

    x = [
        laid(a) if i != 5 else laid(a.swapaxes(1, 2)).swapaxes(1, 2) for i, a in enumerate(inputs())
    ]
    got = [laid(np.asarray(g), inverse=True) for g in run(mapped, *x)]
    near(got, expected(**options))


def test_custom_calls():
    """For CUDA: the arrays behind the known ones, their names, and the option among the others."""
    x = inputs()
    forward, backward = custom_calls(lower(functools.partial(results, attend), *x))
    types = [f"{BATCH}x{SEQLEN}xi32", f"{BATCH}x{HEADS}x{SEQLEN}xi32", f"{BATCH}x{SEQLEN}xi32"]
    for _, attributes, operands, _ in (forward, backward):
        assert operands[-3:] == types
        assert attributes["least_mark"] == f"{LEAST_MARK} : i32"
        assert attributes["operands"][-3:] == ("row_end", "head_row_end", "key_mark")
    mapped = jax.vmap(functools.partial(results, attend))
    *_, operands, _ = custom_calls(lower(mapped, *(jnp.stack([a] * 3) for a in x)))[0]
    assert operands[-3:] == [shape.replace(f"{BATCH}x", f"{3 * BATCH}x", 1) for shape in types]


@pytest.mark.parametrize("mode", [mode for mode, (_, manual) in MODES.items() if manual])
def test_custom_calls_in_a_shard_map(mode):
    """Each device's call has that device's part."""
    _, manual = MODES[mode]
    batch = BATCH // 2 if "data" in manual else BATCH
    heads = HEADS // 2 if "model" in manual else HEADS
    specs = [P(*(n if n in manual else None for n in spec)) for spec in HEADS_SPLIT]
    mapped = jax.shard_map(
        functools.partial(results, attend),
        mesh=mesh_of(data=2, model=2),
        in_specs=tuple(specs),
        out_specs=specs[0],
        axis_names=manual,
    )
    text = lower(mapped, *inputs())
    if manual == {"data", "model"}:  # the others are divided once the partitioner has run
        calls = custom_calls(text)
        assert calls[0][2][-3:] == [f"{batch}x{SEQLEN}xi32", f"{batch}x{heads}x{SEQLEN}xi32"] + [
            f"{batch}x{SEQLEN}xi32"
        ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_custom_calls_of_a_ring(layout):
    """Each step's call has the parts of its rows and keys, never whole sequences."""

    def divided(*x):
        return public.attention(arguments(*x), "ring", "seq", layout)

    mapped = jax.shard_map(
        functools.partial(results, divided),
        mesh=mesh_of(seq=4),
        in_specs=ROWS_SPLIT,
        out_specs=PART,
    )
    calls = custom_calls(lower(mapped, *inputs()))
    assert len(calls) == 8  # four steps, forward and backward
    rows = SEQLEN // 4
    for _, attributes, operands, _ in calls:
        assert operands[-3:] == [f"{BATCH}x{rows}xi32", f"{BATCH}x{HEADS}x{rows}xi32"] + [
            f"{BATCH}x{rows}xi32"
        ]
        assert attributes["least_mark"] == f"{LEAST_MARK} : i32"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            dict(row_end=np.zeros(BATCH, np.int32)),
            ValueError,
            r"row_end has shape \(4,\); expected \(4, 32\)",
        ),
        (
            dict(key_mark=np.zeros((BATCH, SEQLEN))),
            TypeError,
            "key_mark has dtype float64; expected int32",
        ),
        (dict(head_row_end="x"), TypeError, "head_row_end is a str; expected an array"),
    ],
    ids=["shape", "dtype", "no array"],
)
def test_checks(change, error, words):
    query, key, value, *_ = inputs()
    with pytest.raises(error, match=words):
        api.attention(NewArguments(query, key, value, **change))


def test_what_has_no_rule_for_divided_sequences_raises():
    x = jnp.zeros((1, 8, 2, 16))
    dense = Operands(x, x, x, bias=jnp.zeros((1, 2, 8, 8)))
    with pytest.raises(ValueError, match="bias is given; expected whole sequences"):
        Divided("ring", "seq").forward(AttentionOptions(scale=1.0), dense)
