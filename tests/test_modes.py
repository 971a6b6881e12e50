"""Every kind of mesh with every transform: right, and nothing moves between devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from collectives import collectives
from transforms import assert_near, attend, operands, score

ARRAY, INDEX = P("data", None, "model"), P("data")  # batch and heads; batch
PLACES = (ARRAY,) * 3 + (INDEX,) * 3
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def forward(*x):
    return attend(*x)


def value_and_gradients(*x):
    def with_results(*x):
        results = attend(*x)
        return score(*results), results

    (_, results), gradients = jax.value_and_grad(with_results, (0, 1, 2), has_aux=True)(*x)
    return *results, *gradients


def scan_of_remat(*x):
    """Gradients through two layers, each forgetting what is inside."""

    def loss(query, *others):
        def layer(query, _):
            return attend(query, *others)[0], None

        query, _ = jax.lax.scan(jax.checkpoint(layer), query, None, length=2)
        return score(query, 0.0)

    return jax.grad(loss, (0, 1, 2))(*x)


def mapped(query, key, value, query_lengths, key_lengths, offset):
    """vmap of some operands, along different axes."""
    results = jax.vmap(value_and_gradients, in_axes=(1, None, 0, None, None, 0))(
        jnp.stack([query, -query], 1),
        key,
        jnp.stack([value, value + 1]),
        query_lengths,
        key_lengths,
        jnp.stack([offset, offset + 1]),
    )
    return jax.tree.map(lambda x: x[1], results)


TRANSFORMS = {
    function.__name__: function
    for function in (forward, value_and_gradients, scan_of_remat, mapped)
}


@functools.cache
def inputs():
    """Batch 8, every sequence another one."""
    return [np.concatenate(column) for column in zip(*map(operands, range(4)), strict=True)]


@functools.cache
def expected(transform):
    """The results on one device."""
    return jax.jit(TRANSFORMS[transform])(*inputs())


def mesh_of(*kinds):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)


def placed(mesh):
    return [
        jax.device_put(x, NamedSharding(mesh, place))
        for x, place in zip(inputs(), PLACES, strict=True)
    ]


def of_manual(spec, names):
    return P(*(name if name in names else None for name in spec))


def in_shard_map(function, names, check_vma):
    return jax.shard_map(
        function,
        in_specs=tuple(of_manual(place, names) for place in PLACES),
        out_specs=of_manual(ARRAY, names),
        axis_names=names,
        check_vma=check_vma,
    )


BOTH = frozenset(("data", "model"))
MODES = {
    "automatic": ((AUTO, AUTO), None),
    "explicit": ((EXPLICIT, EXPLICIT), None),
    "automatic and explicit": ((AUTO, EXPLICIT), None),
    "explicit and automatic": ((EXPLICIT, AUTO), None),
    "manual": ((AUTO, AUTO), BOTH),
    "manual batch": ((AUTO, AUTO), frozenset(("data",))),
    "manual heads": ((AUTO, AUTO), frozenset(("model",))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mode", MODES)
def test_mode(mode, transform):
    kinds, manual = MODES[mode]
    function = TRANSFORMS[transform]
    mesh = mesh_of(*kinds)
    with jax.set_mesh(mesh):
        for check_vma in (True, False) if manual else (None,):
            call = in_shard_map(function, manual, check_vma) if manual else function
            x = placed(mesh)
            compiled = jax.jit(call).lower(*x).compile()
            assert collectives(compiled) == []
            results = compiled(*x)
            assert_near(results, expected(transform))
            for result in results:
                spec = result.sharding.spec
                assert (spec[0], spec[2]) == ("data", "model"), spec


@pytest.mark.parametrize("mode", [mode for mode, (_, manual) in MODES.items() if not manual])
def test_outside_of_jit(mode):
    mesh = mesh_of(*MODES[mode][0])
    with jax.set_mesh(mesh):
        x = placed(mesh)
        out, lse = attend(*x)
        assert_near((out, lse), expected("forward"))
        for axis, name in ((0, "data"), (2, "model")):
            if mesh.axis_types[mesh.axis_names.index(name)] == EXPLICIT:
                assert jax.typeof(out).sharding.spec[axis] == name
                assert jax.typeof(lse).sharding.spec[axis] == name


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_pmap(transform):
    x = [a[:, None] for a in inputs()]
    got = jax.pmap(TRANSFORMS[transform])(*x)
    assert_near(jax.tree.map(lambda a: a[:, 0], got), expected(transform))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["automatic", "explicit"])
def test_mapped_axis_may_itself_be_split(kind):
    """Eight calls, their axis split over the mesh; no batch to split inside."""
    mesh = mesh_of(kind, kind)
    with jax.set_mesh(mesh):
        x = [
            jax.device_put(
                a[:, None], NamedSharding(mesh, P("data", *([None] * 2 + ["model"]) * (a.ndim > 1)))
            )
            for a in inputs()
        ]
        compiled = jax.jit(jax.vmap(value_and_gradients)).lower(*x).compile()
        assert collectives(compiled) == []
        got = jax.tree.map(lambda a: np.asarray(a)[:, 0], compiled(*x))
        assert_near(got, expected("value_and_gradients"))
