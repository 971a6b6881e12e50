"""The call on eight CPU devices: shard_map, pmap, automatic and explicit axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_fa3 import dot_product_attention
from transforms import assert_near, attend, gradient, jitted, operands, score

ARRAY, INDEX = P("data", None, "model"), P("data")  # batch and heads; batch
PLACES = (ARRAY,) * 3 + (INDEX,) * 3

pytestmark = pytest.mark.usefixtures("forward_kernel_alone")


def mesh_of(shape, names=("data", "model"), kind=AxisType.Auto):
    return jax.make_mesh(
        shape, names, axis_types=(kind,) * len(shape), devices=jax.devices()[: int(np.prod(shape))]
    )


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def batch_of_eight(request):
    """Operands of batch 8, every sequence another one; with kernels for the dtype, and without."""
    x = [np.concatenate(column) for column in zip(*map(operands, range(4)), strict=True)]
    return [a.astype(request.param) for a in x[:3]] + x[3:]


@pytest.fixture(scope="module")
def expected(batch_of_eight):
    """Results and gradients on one device."""
    return jitted(attend)(*batch_of_eight), jitted(gradient)(*batch_of_eight)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 2)])
def test_shard_map(batch_of_eight, expected, shape, check_vma):
    specs = dict(mesh=mesh_of(shape), in_specs=PLACES, check_vma=check_vma)
    results = jax.jit(jax.shard_map(attend, out_specs=(ARRAY, ARRAY), **specs))
    gradients = jax.jit(jax.shard_map(gradient, out_specs=(ARRAY,) * 3, **specs))
    assert_near((results(*batch_of_eight), gradients(*batch_of_eight)), expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_that_leaves_an_axis_of_one_device_automatic(batch_of_eight, expected, check_vma):
    specs = dict(mesh=mesh_of((4, 1)), axis_names={"data"}, check_vma=check_vma)
    specs["in_specs"] = specs["out_specs"] = P("data")
    got = [jax.jit(jax.shard_map(f, **specs))(*batch_of_eight) for f in (attend, gradient)]
    assert_near(tuple(got), expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_grad_outside_shard_map(batch_of_eight, expected, check_vma):
    mapped = jax.shard_map(
        attend, mesh=mesh_of((4, 2)), in_specs=PLACES, out_specs=ARRAY, check_vma=check_vma
    )

    def mapped_loss(*x):
        return score(*mapped(*x))

    assert_near(jax.jit(jax.grad(mapped_loss, argnums=(0, 1, 2)))(*batch_of_eight), expected[1])


def test_replicated_keys_get_the_sum_of_the_shards(batch_of_eight):
    """Queries split along the sequence, keys and values the same on every device."""
    key, value = (a[:2] for a in batch_of_eight[1:3])
    query = np.concatenate(batch_of_eight[:1] * 2, axis=1)[:2, :32]

    def local(query, key, value):
        start = jax.lax.axis_index("seq") * query.shape[1]
        offsets = jnp.full((query.shape[0],), start, jnp.int32)
        return dot_product_attention(query, key, value, is_causal=True, query_offset=offsets)

    mapped = jax.shard_map(
        local,
        mesh=mesh_of((8,), ("seq",)),
        in_specs=(P(None, "seq"), P(), P()),
        out_specs=P(None, "seq"),
    )

    def gradients(function):
        def total(*x):
            return jnp.sum(jnp.sin(3 * function(*x).astype(jnp.float32)))

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(query, key, value)

    whole = functools.partial(dot_product_attention, is_causal=True)
    assert_near(gradients(mapped), gradients(whole))


def test_replicated_result_cannot_be_claimed(batch_of_eight):
    """check_vma sees that the output varies: a wrong out_specs raises instead of passing."""
    mapped = jax.shard_map(attend, mesh=mesh_of((8,), ("data",)), in_specs=P("data"), out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(mapped)(*batch_of_eight)


@pytest.mark.parametrize("check_vma", [True, False])
def test_vmap_and_scan_inside_shard_map(batch_of_eight, expected, check_vma):
    def mapped(*x):
        out, lse = jax.vmap(attend)(*(a[:, None] for a in x))
        return out[:, 0], lse[:, 0]

    def scanned(*x):
        _, results = jax.lax.scan(lambda _, row: (None, attend(*(a[None] for a in row))), None, x)
        return jax.tree.map(lambda a: a[:, 0], results)

    for function in (mapped, scanned):
        got = jax.jit(
            jax.shard_map(
                function,
                mesh=mesh_of((4,), ("data",)),
                in_specs=P("data"),
                out_specs=P("data"),
                check_vma=check_vma,
            )
        )(*batch_of_eight)
        assert_near(got, expected[0])


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_lowers_to_local_custom_calls(batch_of_eight, check_vma):
    """For CUDA, on this machine without one: each device calls the kernels on its own part."""
    x = [a.astype("bfloat16") for a in batch_of_eight[:3]]
    mapped = jax.shard_map(
        jax.grad(lambda *x: dot_product_attention(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2)),
        mesh=mesh_of((4, 2)),
        in_specs=ARRAY,
        out_specs=ARRAY,
        check_vma=check_vma,
    )
    text = jax.jit(mapped).trace(*x).lower(lowering_platforms=("cuda",)).as_text()
    for direction in ("forward", "backward"):
        calls = [line for line in text.splitlines() if f"@jax_fa3_{direction}" in line]
        assert len(calls) == 1
        assert "tensor<2x20x2x16xbf16>" in calls[0] and "tensor<2x24x1x16xbf16>" in calls[0]


def test_pmap(batch_of_eight, expected):
    x = [a[:, None] for a in batch_of_eight]
    got = jax.pmap(attend)(*x), jax.pmap(gradient)(*x)
    assert_near(jax.tree.map(lambda a: a[:, 0], got), expected)


@pytest.mark.parametrize(
    "places",
    [
        PLACES,
        (P(None, "data"),) * 3 + (P(),) * 3,
        (P("data"), P(), P(None, None, "model"), P(), P("data"), P()),
    ],
    ids=["batch and heads", "sequence", "mixed"],
)
def test_automatic_sharding(batch_of_eight, expected, places):
    """jit over sharded arrays is right, whatever has to move."""
    mesh = mesh_of((4, 2))
    x = [
        jax.device_put(a, NamedSharding(mesh, place))
        for a, place in zip(batch_of_eight, places, strict=True)
    ]
    assert_near((jax.jit(attend)(*x), jax.jit(gradient)(*x)), expected)


@pytest.mark.parametrize(
    ("shape", "places"),
    [
        ((4, 2), PLACES),
        ((8, 1), PLACES),
        ((2, 4), PLACES[:1] + (P("data"),) * 2 + PLACES[3:]),  # more shards than key/value heads
        ((4, 2), (P(None, "data"), P("data"), P(), P(), P(), P())),
    ],
    ids=["batch and heads", "batch", "four ways over two heads", "sequence"],
)
def test_explicit_sharding(batch_of_eight, expected, shape, places):
    """Explicit axes: right, and gradients are typed as their operands."""
    mesh = mesh_of(shape, kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = [
            jax.device_put(a, NamedSharding(mesh, place))
            for a, place in zip(batch_of_eight, places, strict=True)
        ]
        results, gradients = jax.jit(attend)(*x), jax.jit(gradient)(*x)
        for grad, operand in zip(gradients, x, strict=False):
            assert jax.typeof(grad).sharding == jax.typeof(operand).sharding
        if places == PLACES:
            assert jax.typeof(results[0]).sharding.spec[0] == "data"
    assert_near((results, gradients), expected)


def test_explicit_sharding_moves_nothing(batch_of_eight):
    """Batch and heads split: no collective in the compiled program, forward or backward."""
    mesh = mesh_of((4, 2), kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = [
            jax.device_put(a, NamedSharding(mesh, place))
            for a, place in zip(batch_of_eight, PLACES, strict=True)
        ]
        for function in (attend, lambda *x: gradient(*x)):
            text = jax.jit(function).lower(*x).compile().as_text()
            for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce("):
                assert collective not in text, collective
