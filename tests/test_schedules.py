"""Which exchanges run beside a kernel: read from programs compiled for four H200s, none of which is
here."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import h200
import jax_fa3
from meshes import PART, STRATEGIES
from schedules import alone, schedule

TOKENS, HEADS, KV_HEADS, DIM = 1 << 16, 32, 8, 128  # XLA joins small exchanges
LAYERS = 3

CAUSAL = {  # forward, backward
    ("ring", "zigzag"): ("P(F) P(F) P(F) F", "P(B) P(B) P(B) P(B) P"),
    ("ring", "contiguous"): ("P P P(F) P(F) P(F) F P", "P P P(B) P(B) P(B) P(B) P P P"),
    ("allgather", "zigzag"): ("G(F) F F", "G(B) B B S(B)"),
    ("allgather", "contiguous"): ("P(F) G(F) F F P(F)", "P(B) G(B) B P(B) S(B)"),
    ("ulysses", "zigzag"): ("T T(F) T(F) T", "T T(B) T(B) T"),
    ("ulysses", "contiguous"): ("T T(F) T(F) T", "T T(B) T(B) T"),
}
OTHERS = [
    ("ring", "contiguous", {}, "P(F) P(F) P(F) F P(B) P(B) P(B) P(B) P"),
    ("allgather", "contiguous", {}, "G(F) F G(B) B S(B)"),
    ("ring", "contiguous", dict(local_window_size=(TOKENS // 4, 0)), "P(F) F P(B) B P"),
    # Masks that no length can tell: all keys at once, when they are there.
    ("allgather", "contiguous", dict(local_window_size=(9, 0)), "G G F G G B S S"),
]


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(h200.devices(4)), ("seq",))


def compiled(mesh, attend, mode, heads=KV_HEADS):
    """Attention, or layers of it, and its gradients."""

    def attention(x):
        return attend(x, x[:, :, :heads], x[:, :, -heads:])

    def layers(x):
        layer = jax.checkpoint(attention) if mode == "remat" else attention
        return jax.lax.scan(lambda x, _: (x + layer(x), None), x, length=LAYERS)[0]

    def gradient(x, dout):
        out, pullback = jax.vjp(attention if mode == "plain" else layers, x)
        return out, pullback(dout)

    x = jax.ShapeDtypeStruct(
        (1, TOKENS, HEADS, DIM), "bfloat16", sharding=NamedSharding(mesh, PART)
    )
    with jax.set_mesh(mesh):
        return jax.jit(gradient).lower(x, x).compile()


def mapped(mesh, strategy, layout, **options):
    attend = functools.partial(STRATEGIES[strategy], axis_name="seq", layout=layout, **options)
    return jax.shard_map(attend, mesh=mesh, in_specs=PART, out_specs=PART)


@pytest.mark.parametrize("in_layers", [False, True], ids=["alone", "layers"])
@pytest.mark.parametrize(("strategy", "layout"), CAUSAL)
def test_causal(mesh, strategy, layout, in_layers):
    """Layers are scanned. Under remat, in one of the layouts, the forward pass is done again before
    the backward pass of each layer."""
    mode = "plain" if not in_layers else "scan" if layout == "contiguous" else "remat"
    forward, backward = CAUSAL[strategy, layout]
    expected = {
        "plain": f"{forward} {backward}",
        "scan": f"[ {forward} ] [ {backward} ]",
        "remat": f"[ {forward} ] [ {forward} {backward} ]",
    }
    program = compiled(mesh, mapped(mesh, strategy, layout, is_causal=True), mode)
    assert schedule(program) == expected[mode]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_automatic_axes(mesh, strategy):
    attend = functools.partial(
        jax_fa3.dot_product_attention, is_causal=True, sequence_parallel=strategy
    )
    assert schedule(compiled(mesh, attend, "plain")) == " ".join(CAUSAL[strategy, "contiguous"])


@pytest.mark.parametrize(("strategy", "layout", "options", "expected"), OTHERS, ids=str)
def test_other_masks(mesh, strategy, layout, options, expected):
    assert schedule(compiled(mesh, mapped(mesh, strategy, layout, **options), "plain")) == expected


@pytest.mark.parametrize(("strategy", "layout"), CAUSAL)
def test_sinks_and_a_cap_change_nothing(mesh, strategy, layout):
    scores = dict(sinks=np.ones(HEADS, "float32"), logits_soft_cap=30.0)
    program = compiled(mesh, mapped(mesh, strategy, layout, is_causal=True, **scores), "plain")
    assert schedule(program) == " ".join(CAUSAL[strategy, layout])


def test_slopes_take_all_keys_at_once(mesh):
    slopes = dict(alibi_slopes=np.ones(HEADS, "float32"))
    program = compiled(mesh, mapped(mesh, "allgather", "contiguous", **slopes), "plain")
    assert schedule(program) == "G G F G G B S S"


def test_more_groups_of_heads(mesh):
    """The first group of four arrives alone, and the last one leaves so."""
    program = compiled(mesh, mapped(mesh, "ulysses", "zigzag"), "plain", heads=HEADS // 2)
    forward = "T T(F) T(F) T(F) T(F) T"
    assert schedule(program) == f"{forward} {forward.replace('F', 'B')}"
    assert alone(schedule(program)) == "TTTT"


@pytest.mark.parametrize(
    ("strategy", "layout", "mode", "expected", "tables"),
    [
        ("ring", "contiguous", "plain", "P(F) P(F) P(F) F P(B) P(B) P(B) P(B) P", 4),
        (
            "ring",
            "contiguous",
            "scan",
            "[ P(F) P(F) P(F) F ] [ P(B) P(B) P(B) P(B) P ]",
            4,
        ),
        ("allgather", "contiguous", "plain", "G G F G G B S S", 1),
        ("allgather", "striped", "scan", "[ G G F ] [ G G B S S ]", 1),
        ("ulysses", "zigzag", "plain", "T T(F) T(F) T T T(B) T(B) T", 0),
    ],
)
def test_documents(mesh, strategy, layout, mode, expected, tables):
    """Beside the table of the whole sequence there is one for each visit, made once for both
    passes. A scan over layers makes them before its first layer, and in its backward pass again."""

    def attention(x, table):
        attend = functools.partial(STRATEGIES[strategy], axis_name="seq", layout=layout)
        keys, values = x[:, :, :KV_HEADS], x[:, :, -KV_HEADS:]
        return attend(x, keys, values, is_causal=True, visibility=table)

    def layers(x, table):
        return jax.lax.scan(lambda x, _: (x + attention(x, table), None), x, length=LAYERS)[0]

    def gradient(x, ids, dout):
        table = jax_fa3.make_visibility(ids)
        function = attention if mode == "plain" else layers
        divided = jax.shard_map(function, mesh=mesh, in_specs=(PART, P()), out_specs=PART)
        out, pullback = jax.vjp(lambda x: divided(x, table), x)
        return out, pullback(dout)

    x, ids = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in (
            ((1, TOKENS, HEADS, DIM), "bfloat16", PART),
            ((1, TOKENS), "int32", P()),
        )
    )
    program = jax.jit(gradient).lower(x, ids, x).compile()
    assert schedule(program) == expected
    target = 'custom_call_target="jax_fa3_visibility"'
    loops, outside = (part.count(target) for part in program.as_text().split("ENTRY"))
    assert (loops, outside) == (0 if mode == "plain" else tables, 1 + tables)
