"""The kernels over the GPUs of this machine: one GPU's bits where batch and heads are split, within
the tolerance rule where sums or sequences are, and equal bits each time."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.device_count() < 2:
    pytest.skip("these tests need at least two GPUs", allow_module_level=True)

from jax.sharding import PartitionSpec as P

import contract
from cases import Case
from collectives import collectives
from jax_fa3 import is_supported
from meshes import (
    LAYOUTS,
    STRATEGIES,
    both_kinds,
    check_heads,
    check_sequence,
    check_strategy,
    compiled_for,
    mesh_of,
    place,
    strategy_program,
    vector_jacobian,
)
from modes import ARRAY, EXPLICIT, MODES, TRANSFORMS, Problem, assert_split, checks
from oracle import Results
from processes import CASE, digests, digests_of_processes

DEVICES = 4 if jax.device_count() >= 4 else 2
SHAPES = {2: ((2, 1), (1, 2)), 4: ((2, 2),)}[DEVICES]  # (data, model)
on_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)

PROBLEM = Problem(
    Case(
        batch=4,
        seqlen_q=300,
        seqlen_k=330,
        heads_q=8,
        heads_kv=4,
        head_dim=64,
        causal=True,
        offset=(30, -20, 0, 200),
        query_lengths=(300, 211, 0, 299),
        key_lengths=(330, 129, 44, 1),
        deterministic=True,
    ),
    implementation="fa3",
)

# Larger than a wave of blocks on one GPU's share, so that their order can differ between runs.
REPEATED = Case(
    batch=4,
    seqlen_q=2048,
    seqlen_k=2048,
    heads_q=16,
    heads_kv=8,
    head_dim=128,
    causal=True,
    deterministic=True,
)
REPEATS = 200

SEQUENCE = Case(
    batch=2, seqlen_q=512, seqlen_k=512, heads_q=8, heads_kv=2, head_dim=64, causal=True
)


def assert_same_bits(got, want):
    """Equal bits of every leaf, whatever they stand for."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g), np.asarray(w)
        assert (g.dtype, g.shape) == (w.dtype, w.shape)
        assert g.tobytes() == w.tobytes(), f"{np.mean(g != w):.2%} of the elements differ"


# --- batch and heads ------------------------------------------------------------------------------


def test_one_gpu_is_right():
    """What the others are compared with."""
    case = PROBLEM.case
    out, lse, *gradients = PROBLEM.expected("results_and_gradients")
    lse = np.where(case.blind, -np.inf, lse)
    contract.compare(case, case.inputs(), Results(out, lse, *gradients))


@on_shapes
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mode", MODES)
def test_mode(mode, transform, shape):
    for check_vma in checks(mode):
        mesh, function, x = PROBLEM.on_mesh(mode, shape, transform, check_vma=check_vma)
        with jax.set_mesh(mesh):
            compiled = compiled_for(function, *x)
            assert collectives(compiled) == []
            results = compiled(*x)
        assert_same_bits(results, PROBLEM.expected(transform))
        assert_split(mesh, results)


@on_shapes
@pytest.mark.parametrize("mode", [mode for mode, (_, manual) in MODES.items() if not manual])
def test_outside_of_jit(mode, shape):
    mesh, function, x = PROBLEM.on_mesh(mode, shape, "forward")
    with jax.set_mesh(mesh):
        results = function(*x)
    assert_same_bits(results, PROBLEM.expected("forward"))
    if EXPLICIT in mesh.axis_types:
        assert_split(mesh, results)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_pmap(transform):
    assert_same_bits(PROBLEM.pmapped(transform, DEVICES), PROBLEM.expected(transform))


@both_kinds
@pytest.mark.parametrize(("heads_q", "heads_kv"), [(8, 1), (12, 3)], ids=["one", "straddling"])
def test_fewer_key_heads_than_devices(kind, heads_q, heads_kv):
    case = Case(seqlen_q=300, seqlen_k=300, heads_q=heads_q, heads_kv=heads_kv, causal=True)
    compiled = check_heads(kind, case, DEVICES, implementation="fa3")
    assert {name for name, _ in collectives(compiled)} == {"all-reduce"}


# --- divided sequences ----------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sequence_that_arrives_split(kind, strategy):
    mesh = mesh_of(kind, seq=DEVICES)
    options = dict(sequence_parallel=strategy, implementation="fa3")
    check_sequence(mesh, SEQUENCE, P(None, "seq"), **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy(strategy, layout):
    check_strategy(SEQUENCE, strategy, layout, DEVICES, implementation="fa3")


# --- equal bits each time -------------------------------------------------------------------------


@jax.jit
def differences(got, want):
    """The number of elements whose bits differ, counted where they are."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    bits = ([x.view(f"uint{8 * x.dtype.itemsize}") for x in pair] for pair in pairs)
    return sum(jnp.sum(g != w) for g, w in bits)


def assert_repeats(compiled, x):
    first = compiled(*x)
    assert all(np.any(result) for result in first)
    found = [int(differences(compiled(*x), first)) for _ in range(REPEATS)]
    assert not any(found), f"elements that differ, by repeat: {found}"


def test_sharded_gradients_repeat():
    data, model = SHAPES[0]
    mesh = mesh_of(data=data, model=model)
    x = place(mesh, REPEATED.inputs(), (ARRAY,) * 5)
    assert_repeats(compiled_for(vector_jacobian(REPEATED, implementation="fa3"), *x), x)


def test_ring_repeats():
    function, x = strategy_program(REPEATED, "ring", "zigzag", DEVICES, implementation="fa3")
    assert_repeats(compiled_for(function, *x), jax.device_put(x))


# --- several processes ----------------------------------------------------------------------------


def test_two_processes_give_the_bits_of_one():
    """One GPU each; the memory that this process has taken stays its own."""
    assert is_supported(*CASE.inputs()[:3]) is None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:2]
    environments = [
        {"CUDA_VISIBLE_DEVICES": device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        for device in visible
    ]
    assert digests_of_processes(environments) == digests(jax.devices()[:2])
