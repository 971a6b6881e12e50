"""Attention over a divided sequence, on CPU devices: results and gradients, against the oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import contract
import jax_fa3
from case import Case
from cases import vary
from collectives import collectives
from meshes import (
    LAYOUTS,
    PART,
    STRATEGIES,
    check_strategy,
    compiled_for,
    mesh_of,
    place,
    run,
    strategy_call,
)
from oracle import Results

CASES = vary(
    dict(heads_kv=8),
    dict(heads_kv=1),
    dict(seqlen_k=32),
    dict(window=(5, 9)),
    dict(window=(40, 0)),
    dict(key_lengths=(40, 17)),
    dict(query_lengths=(3, 60), key_lengths=(0, 33)),
    dict(query_lengths=(0, 0), key_lengths=(0, 0)),
    dict(offset=-20, window=(3, 2)),
    dict(offset=(7, -90), window=(20, 10)),
    seqlen_q=64,
    seqlen_k=64,
    heads_q=8,
    heads_kv=2,
    head_dim=16,
) + vary(
    dict(),
    dict(heads_kv=8, dtype="float32"),
    dict(window=(9, 0)),
    dict(window=10_000),
    dict(key_lengths=(33, 0)),
    dict(key_lengths=(64, 50), query_lengths=(33, 0)),
    dict(offset=5),
    dict(offset=-200),
    dict(offset=(-20, 9)),
    dict(seqlen_k=128, offset=64),
    dict(seqlen_q=0),
    dict(seqlen_q=128),
    dict(seqlen_k=0, query_lengths=(3, 64)),
    dict(head_dim_v=24),
    seqlen_q=64,
    seqlen_k=64,
    heads_q=8,
    heads_kv=2,
    head_dim=16,
    causal=True,
)


def walk(cases):
    """Each case with both strategies, each in another layout; layouts and devices in turn."""
    for i, case in enumerate(cases):
        for j, strategy in enumerate(("ring", "allgather")):
            yield case, (4, 2)[i % 2], strategy, LAYOUTS[(i // 2 + j) % 2]


@pytest.mark.parametrize(
    ("case", "size", "strategy", "layout"), list(walk(CASES)), ids=lambda x: getattr(x, "name", x)
)
def test_case(case, size, strategy, layout):
    check_strategy(case, strategy, layout, size, check_vma=layout == "contiguous")


CAUSAL = dataclasses.replace(CASES[0], causal=True, heads_kv=2)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", ["ring", "allgather"])
def test_causal_over_any_number_of_devices(strategy, layout, size):
    case = dataclasses.replace(CAUSAL, seqlen_q=48, seqlen_k=48, heads_kv=4, batch=1)
    check_strategy(case, strategy, layout, size, check_vma=layout == "zigzag")


@pytest.mark.parametrize(
    ("case", "layout", "size"),
    [
        (CAUSAL, "zigzag", 4),
        (dataclasses.replace(CAUSAL, heads_kv=1), "contiguous", 8),
        (dataclasses.replace(CAUSAL, heads_kv=8), "zigzag", 2),
        (dataclasses.replace(CAUSAL, heads_q=12, heads_kv=4), "contiguous", 2),
        (dataclasses.replace(CAUSAL, heads_q=12, heads_kv=4, window=(9, 0)), "contiguous", 3),
        (dataclasses.replace(CASES[6], seqlen_k=32), "zigzag", 2),
        (dataclasses.replace(CAUSAL, offset=(-20, 9), seqlen_k=128), "contiguous", 4),
    ],
    ids=[
        "GQA",
        "MQA",
        "four exchanges",
        "groups kept",
        "groups cut unevenly",
        "lengths",
        "offsets",
    ],
)
def test_ulysses(case, layout, size):
    if size == 3:
        case = dataclasses.replace(case, seqlen_q=48, seqlen_k=48)
    check_strategy(case, "ulysses", layout, size)


@pytest.mark.parametrize(
    ("strategy", "causal"), [("ring", True), ("allgather", True), ("allgather", False)]
)
def test_odd_number_of_rows_goes_without_halves(strategy, causal):
    case = dataclasses.replace(CAUSAL, seqlen_q=36, seqlen_k=36, causal=causal)
    check_strategy(case, strategy, "contiguous", 4)


def test_key_lengths_that_end_within_own_and_others_keys():
    """Own keys are taken out of the gathered ones, in layout "zigzag" two chunks of them."""
    case = dataclasses.replace(CAUSAL, batch=5, key_lengths=(0, 5, 20, 43, 64))
    check_strategy(case, "allgather", "zigzag", 4)
    check_strategy(dataclasses.replace(case, causal=False), "allgather", "zigzag", 4)


@pytest.mark.parametrize("strategy", ["ring", "allgather"])
def test_error_stays_within_the_rule_over_many_devices(strategy):
    """Eight partial results in bfloat16, merged: rounding must not add up."""
    case = Case(1, 512, 512, 2, 1, 64, causal=True)
    check_strategy(case, strategy, "contiguous", 8)


def attend_whole(query, key, value):
    return jax_fa3.dot_product_attention(query, key, value, is_causal=True)


def gradient_of(function):
    def loss(*x):
        return jnp.sum(jnp.sin(3 * function(*x).astype(jnp.float32)))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def near(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float32), np.asarray(w, np.float32)
        assert np.linalg.norm(g - w) <= 1e-5 * np.linalg.norm(w)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scan_and_remat_beside_batch_and_head_axes(strategy):
    """Three layers under scan and remat, in float32, on a mesh of data, seq and heads."""
    case = dataclasses.replace(CAUSAL, dtype="float32", heads_kv=4)
    operands = case.inputs()[:3]
    attend = functools.partial(STRATEGIES[strategy], axis_name="seq", is_causal=True)

    def layers(function):
        @functools.partial(
            jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("context")
        )
        def layer(query, key, value):
            return query + function(query, key, value)

        def run(query, key, value):
            step = lambda x, _: (layer(x, key, value), None)  # noqa: E731
            return jax.lax.scan(step, query, length=3)[0]

        return run

    spec = P("data", "seq", "model")
    mapped = jax.shard_map(
        layers(attend), mesh=mesh_of(data=2, seq=2, model=2), in_specs=spec, out_specs=spec
    )
    got = run(gradient_of(mapped), *operands)
    want = run(gradient_of(layers(attend_whole)), *operands)
    near(got, want)


def test_automatic_axes_beside_a_ring():
    """A shard_map over seq alone: batch and heads are divided as by one over all axes, and the same
    moves between devices."""
    case = dataclasses.replace(CAUSAL, heads_q=4, query_lengths=(64, 40))
    mesh, split, lengths = mesh_of(data=2, seq=2, model=2), P("data", "seq", "model"), P("data")
    x = place(mesh, (*case.inputs(), *case.index_arrays.values()), (*(split,) * 5, lengths))

    def program(specs, names):
        call = strategy_call(case, "ring", "contiguous")
        mapped = jax.shard_map(
            lambda *x: call(*x[:5], dict(query_seq_lengths=x[5])),
            mesh=mesh,
            in_specs=specs,
            out_specs=specs[0],
            axis_names=names,
        )
        return compiled_for(mapped, *x)

    everywhere = program((*(split,) * 5, lengths), {"data", "seq", "model"})
    beside = program((*(PART,) * 5, P()), {"seq"})
    assert sorted(collectives(beside)) == sorted(collectives(everywhere))
    contract.compare(case, case.inputs(), Results(*map(np.asarray, beside(*x))))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_batch_and_over_two_mesh_axes(strategy):
    """(seq, heads, head_dim) arrays; the sequence divided over two axes as over one."""
    case = dataclasses.replace(CAUSAL, dtype="float32", batch=1)
    operands = [x[0] for x in case.inputs()[:3]]
    attend = functools.partial(STRATEGIES[strategy], axis_name=("outer", "inner"), is_causal=True)
    spec = P(("outer", "inner"))
    mapped = jax.shard_map(attend, mesh=mesh_of(outer=2, inner=2), in_specs=spec, out_specs=spec)
    got = run(gradient_of(mapped), *operands)
    near(got, run(gradient_of(attend_whole), *operands))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_keys_that_every_device_has_a_copy_of(strategy):
    """Replicated operands: their gradients are the sums over the devices' copies."""
    case = dataclasses.replace(CAUSAL, dtype="float32", heads_kv=4, causal=False, seqlen_k=24)
    operands = case.inputs()[:3]
    attend = functools.partial(STRATEGIES[strategy], axis_name="seq")
    mapped = jax.shard_map(attend, mesh=mesh_of(seq=4), in_specs=(PART, P(), P()), out_specs=PART)

    def whole(query, key, value):
        return jax_fa3.dot_product_attention(
            query, *(jnp.tile(x, (1, 4, 1, 1)) for x in (key, value))
        )

    got = run(gradient_of(mapped), *operands)
    near(got, run(gradient_of(whole), *operands))
