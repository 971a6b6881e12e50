"""dot_product_attention on arrays whose sequence is split, under jit and with explicit sharding."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from case import Case
from collectives import collectives
from contract import compare
from jax_fa3 import dot_product_attention
from meshes import (
    KINDS,
    both_kinds,
    check_sequence,
    mesh_of,
    place,
    run,
    vector_jacobian,
)
from oracle import Results

CASE = Case(
    seqlen_q=32,
    seqlen_k=32,
    heads_q=4,
    heads_kv=2,
    head_dim=16,
    causal=True,
    offset=(0, -3),
    query_lengths=(32, 29),
    key_lengths=(27, 32),
)
WINDOW = Case(seqlen_q=64, seqlen_k=64, heads_q=4, heads_kv=4, head_dim=16, window=(5, 0))
MOVES = {
    "allgather": {"all-gather", "collective-permute", "reduce-scatter"},
    "ring": {"collective-permute"},
    "ulysses": {"all-to-all"},
}


@both_kinds
@pytest.mark.parametrize("strategy", MOVES)
def test_strategy(kind, strategy):
    mesh = mesh_of(kind, data=2, seq=4)
    compiled = check_sequence(mesh, CASE, P("data", "seq"), sequence_parallel=strategy)
    assert {kind for kind, _ in collectives(compiled)} <= MOVES[strategy]


@both_kinds
def test_auto_takes_a_ring_for_a_window(kind):
    compiled = check_sequence(mesh_of(kind, seq=8), WINDOW, P(None, "seq"))
    assert {kind for kind, _ in collectives(compiled)} == {"collective-permute"}


@both_kinds
def test_sequence_batch_and_heads(kind):
    """Three axes at once, the heads' finer than the key heads."""
    case = Case(seqlen_q=16, seqlen_k=16, heads_q=4, heads_kv=1, head_dim=16, causal=True)
    mesh = mesh_of(kind, data=2, seq=2, model=2)
    check_sequence(mesh, case, P("data", "seq", "model"), keys=P("data", "seq"))


@both_kinds
def test_sequence_over_two_axes(kind):
    mesh = mesh_of(kind, a=2, b=4)
    check_sequence(mesh, CASE, P(None, ("a", "b")), sequence_parallel="allgather")


@both_kinds
def test_queries_split_keys_whole(kind):
    check_sequence(mesh_of(kind, seq=4), CASE, P(None, "seq"), keys=P())


@both_kinds
def test_keys_that_do_not_divide_are_gathered(kind):
    case = Case(seqlen_q=32, seqlen_k=30, heads_q=4, heads_kv=2, head_dim=16, causal=True)
    mesh = mesh_of(kind, seq=4)
    with jax.set_mesh(mesh):
        x = place(mesh, case.inputs(), (P(None, "seq"), P(), P(), P(), P()))
        compare(
            case,
            case.inputs(),
            Results(*map(np.asarray, run(vector_jacobian(case), *x))),
        )
        with pytest.raises(Exception, match="'ring', but key has seq = 30.*not a multiple.*4"):
            jax.jit(vector_jacobian(case, sequence_parallel="ring"))(*x)


@both_kinds
def test_float32_goes_the_same_way_when_asked(kind):
    case = Case(seqlen_q=32, seqlen_k=32, heads_q=4, heads_kv=2, head_dim=16, dtype="float32")
    compiled = check_sequence(mesh_of(kind, seq=4), case, P(None, "seq"), sequence_parallel="ring")
    assert {kind for kind, _ in collectives(compiled)} == {"collective-permute"}


def test_explicit_sequence_beside_an_automatic_batch():
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(AxisType.Auto, AxisType.Explicit))
    case = Case(seqlen_q=32, seqlen_k=32, heads_q=4, heads_kv=2, head_dim=16, causal=True)
    with jax.set_mesh(mesh):
        split = P("data", "seq")
        x = place(mesh, case.inputs(), (split,) * 5)
        compare(
            case,
            case.inputs(),
            Results(*map(np.asarray, run(vector_jacobian(case), *x))),
        )


def test_vmap_of_a_split_sequence():
    query, key, value = CASE.inputs()[:3]
    mesh = mesh_of(AxisType.Auto, seq=4)
    x = [
        jax.device_put(np.stack([a, -a]), NamedSharding(mesh, P(None, None, "seq")))
        for a in (query, key, value)
    ]

    def call(*x):
        return dot_product_attention(*x, is_causal=True, sequence_parallel="ring")

    got = run(jax.vmap(call), *x)
    want = [call(query, key, value), call(-query, -key, -value)]
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_error_names_the_axis_and_the_cure(kind):
    """With explicit axes when the call is traced; else when XLA has settled the shardings."""
    error = ValueError if kind == "explicit" else jax.errors.JaxRuntimeError
    mesh = mesh_of(KINDS[kind], data=2, seq=4)
    with jax.set_mesh(mesh):
        x = place(mesh, CASE.inputs()[:3], (P("data", "seq"),) * 3)

        def call(*x):
            return dot_product_attention(*x, sequence_parallel="error")

        with pytest.raises(error, match="query .* split over mesh axis 'seq'.*'error'.*expected"):
            jax.jit(call)(*x)


def test_error_of_a_strategy_that_does_not_fit():
    case = Case(seqlen_q=32, seqlen_k=32, heads_q=6, heads_kv=2, head_dim=16)
    mesh = mesh_of(AxisType.Explicit, seq=4)
    with jax.set_mesh(mesh):
        x = place(mesh, case.inputs()[:3], (P(None, "seq"),) * 3)
        with pytest.raises(ValueError, match="query has 6 heads.*'seq'"):
            dot_product_attention(*x, sequence_parallel="ulysses")


def test_error_where_a_shard_map_leaves_the_axis_automatic():
    mesh = mesh_of(AxisType.Auto, data=2, seq=4)

    def call(*x):
        return dot_product_attention(*x, sequence_parallel="ring")

    mapped = jax.shard_map(
        call, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
    )
    x = place(mesh, CASE.inputs()[:3], (P("data", "seq"),) * 3)
    with pytest.raises(jax.errors.JaxRuntimeError, match="make the axis manual"):
        jax.jit(mapped)(*x)
