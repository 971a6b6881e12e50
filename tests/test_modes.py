"""Every kind of mesh with every transform: right, and nothing moves between devices."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from case import Case
from collectives import collectives
from meshes import both_kinds, compiled_for, mesh_of, place, run
from modes import EXPLICIT, MODES, TRANSFORMS, Problem, assert_split, checks
from transforms import CASE, assert_near

PROBLEM = Problem(
    dataclasses.replace(
        CASE,
        batch=8,
        offset=CASE.offset * 4,
        query_lengths=CASE.query_lengths * 4,
        key_lengths=CASE.key_lengths * 4,
    )
)
SHAPE = (4, 2)
# Documents of rows and keys, and intervals of each key head: a table that has heads.
DOCUMENTS = Problem(
    Case(
        batch=8,
        seqlen_q=20,
        seqlen_k=24,
        heads_q=4,
        heads_kv=2,
        head_dim=16,
        causal=True,
        offset=4,
        documents=((9, 11), (20,), (3, 4, 5), ()) * 2,
        key_documents=((12, 12), (22,), (5, 0, 19), (24,)) * 2,
        intervals="kv head",
        chunk=13,
    )
)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mode", MODES)
def test_mode(mode, transform):
    for check_vma in checks(mode):
        mesh, function, x = PROBLEM.on_mesh(mode, SHAPE, transform, check_vma=check_vma)
        with jax.set_mesh(mesh):
            compiled = compiled_for(function, *x)
            assert collectives(compiled) == []
            results = compiled(*x)
        assert_near(results, PROBLEM.expected(transform))
        assert_split(mesh, results)


@pytest.mark.parametrize("transform", ("results_and_gradients", "scan_of_remat", "mapped"))
@pytest.mark.parametrize("mode", MODES)
def test_mode_of_documents(mode, transform):
    """The table is made where its sources are, and used there."""
    for check_vma in checks(mode):
        mesh, function, x = DOCUMENTS.on_mesh(mode, SHAPE, transform, check_vma=check_vma)
        with jax.set_mesh(mesh):
            compiled = compiled_for(function, *x)
            assert collectives(compiled) == []
            results = compiled(*x)
        assert_near(results, DOCUMENTS.expected(transform))
        assert_split(mesh, results)


def test_documents_under_the_older_partitioner():
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        mesh, function, x = DOCUMENTS.on_mesh("automatic", SHAPE, "results_and_gradients")
        with jax.set_mesh(mesh):
            compiled = compiled_for(function, *x)
            assert collectives(compiled) == []
            assert_near(compiled(*x), DOCUMENTS.expected("results_and_gradients"))
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)


@pytest.mark.parametrize(
    ("mode", "shape"), [("automatic and explicit", (1, 2)), ("manual batch", (2, 1))]
)
def test_automatic_axis_of_one_device(mode, shape):
    mesh, function, x = PROBLEM.on_mesh(mode, shape, "results_and_gradients")
    with jax.set_mesh(mesh):
        assert_near(run(function, *x), PROBLEM.expected("results_and_gradients"))


@pytest.mark.parametrize("mode", [mode for mode, (_, manual) in MODES.items() if not manual])
def test_outside_of_jit(mode):
    mesh, function, x = PROBLEM.on_mesh(mode, SHAPE, "forward")
    with jax.set_mesh(mesh):
        out, lse = function(*x)
    assert_near((out, lse), PROBLEM.expected("forward"))
    for axis, name in ((0, "data"), (2, "model")):
        if mesh.axis_types[mesh.axis_names.index(name)] == EXPLICIT:
            assert jax.typeof(out).sharding.spec[axis] == name
            assert jax.typeof(lse).sharding.spec[axis] == name


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_pmap(transform):
    assert_near(PROBLEM.pmapped(transform, devices=8), PROBLEM.expected(transform))


@both_kinds
def test_mapped_axis_may_itself_be_split(kind):
    """Eight calls, their axis split over the mesh; no batch to split inside."""
    mesh = mesh_of(kind, data=4, model=2)
    places = [P("data", *([None] * 2 + ["model"]) * (x.ndim > 1)) for x in PROBLEM.operands]
    with jax.set_mesh(mesh):
        x = place(mesh, [x[:, None] for x in PROBLEM.operands], places)
        compiled = compiled_for(jax.vmap(PROBLEM.results_and_gradients), *x)
        assert collectives(compiled) == []
        got = jax.tree.map(lambda a: np.asarray(a)[:, 0], compiled(*x))
    assert_near(got, PROBLEM.expected("results_and_gradients"))
