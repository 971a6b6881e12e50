"""Automatic and explicit axes where shardings differ between operands, and known traps of both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from case import Case
from collectives import collectives, total_bytes
from contract import compare
from jax_fa3 import dot_product_attention
from meshes import both_kinds, check_heads, compiled_for, mesh_of, place, run, vector_jacobian
from oracle import Results
from transforms import assert_near, attend, gradient, operands

ARRAY, INDEX = P("data", None, "model"), P("data")
PLACES = (ARRAY,) * 3 + (INDEX,) * 3


@functools.cache
def batch_of_eight():
    return [np.concatenate(column) for column in zip(*map(operands, range(4)), strict=True)]


@functools.cache
def expected():
    """Results and gradients on one device."""
    return run(attend, *batch_of_eight()), run(gradient, *batch_of_eight())


# ---- fewer key/value heads than devices


@both_kinds
@pytest.mark.parametrize(
    ("heads_q", "heads_kv", "devices"),
    [(8, 2, 4), (8, 1, 8), (8, 4, 8), (12, 4, 6), (12, 6, 4), (6, 6, 3)],
    ids=["half a group", "one head", "one query head", "uneven", "straddling", "no groups"],
)
def test_replicated_key_heads(kind, heads_q, heads_kv, devices):
    """Each device attends to the heads its queries belong to; gradients are summed once."""
    case = Case(seqlen_q=20, seqlen_k=20, heads_q=heads_q, heads_kv=heads_kv, head_dim=16)
    compiled = check_heads(kind, case, devices)
    if heads_kv % devices == 0:  # each device's own heads' gradients, collected where typed so
        assert {kind for kind, _ in collectives(compiled)} <= {"all-gather"}
    else:
        assert {kind for kind, _ in collectives(compiled)} == {"all-reduce"}
        assert total_bytes(compiled) == 2 * case.inputs()[1].size * 4  # dkey, dvalue in float32


@pytest.mark.parametrize("sizes", [dict(a=2, b=4), dict(a=4, b=2)], ids=str)
def test_key_heads_split_over_some_of_the_axes(sizes):
    case = Case(seqlen_q=20, seqlen_k=20, heads_q=16, heads_kv=4, head_dim=16)
    mesh = mesh_of(AxisType.Auto, **sizes)
    split, some = P(None, None, ("a", "b")), P(None, None, "a")
    x = place(mesh, case.inputs(), (split, some, some, split, split))
    compiled = compiled_for(vector_jacobian(case), *x)
    compare(case, case.inputs(), Results(*map(np.asarray, compiled(*x))))
    assert {kind for kind, _ in collectives(compiled)} <= {"all-reduce"}


def test_replicated_key_heads_inside_shard_map():
    """Four key heads and two query heads on each device cannot be meant; the error has the cure."""
    case = Case(seqlen_q=20, seqlen_k=20, heads_q=8, heads_kv=4, head_dim=16)
    query, key, value = case.inputs()[:3]
    specs = P(None, None, "model")
    mesh = mesh_of(AxisType.Auto, model=4)

    def naive(query, key, value):
        return dot_product_attention(query, key, value)

    def selecting(query, key, value):
        mine = jax.lax.axis_index("model") * query.shape[2] // 2  # two query heads to a key head
        key, value = (jax.lax.dynamic_slice_in_dim(x, mine, 1, 2) for x in (key, value))
        return dot_product_attention(query, key, value)

    def mapped(function):
        return jax.shard_map(function, mesh=mesh, in_specs=(specs, P(), P()), out_specs=specs)

    with pytest.raises(ValueError, match=r"query has 2 heads.*key's 4 heads.*'model'.*own heads"):
        jax.jit(mapped(naive))(query, key, value)
    assert_near(run(mapped(selecting), query, key, value), dot_product_attention(query, key, value))


# ---- operands sharded differently


@both_kinds
def test_replicated_cotangents_come_to_the_query(kind):
    """The cotangent of a sum is the same everywhere; nothing is gathered to meet it."""
    mesh = mesh_of(kind, data=4, model=2)

    def gradients(*x):
        return jax.grad(lambda *y: attend(*y, *x[3:])[0].astype(jnp.float32).sum(), (0, 1, 2))(
            *x[:3]
        )

    with jax.set_mesh(mesh):
        x = place(mesh, batch_of_eight(), PLACES)
        compiled = compiled_for(gradients, *x)
        assert collectives(compiled) == []
        assert_near(compiled(*x), run(gradients, *batch_of_eight()))


@both_kinds
@pytest.mark.parametrize(
    "places",
    [
        (P("data"), P(), P(None, None, "model"), P(), P("data"), P()),
        (P(), ARRAY, ARRAY, P(), P(), P()),
        (ARRAY, P(), P(), P(), P(), P()),
    ],
    ids=["each another", "keys only", "queries only"],
)
def test_the_finest_split_of_any_operand(kind, places):
    """A replicated operand follows without communication in the forward pass."""
    mesh = mesh_of(kind, data=4, model=2)
    with jax.set_mesh(mesh):
        x = place(mesh, batch_of_eight(), places)
        shardings = (NamedSharding(mesh, ARRAY),) * 2
        if kind == AxisType.Auto:
            forward = jax.jit(attend, out_shardings=shardings).lower(*x).compile()
            assert collectives(forward) == []
        else:
            forward = compiled_for(attend, *x)
        assert_near((forward(*x), run(gradient, *x)), expected())


@both_kinds
def test_head_dim_is_gathered(kind):
    mesh = mesh_of(kind, data=4, model=2)
    with jax.set_mesh(mesh):
        wrong = P("data", None, None, "model")
        x = place(mesh, batch_of_eight(), (wrong,) * 3 + PLACES[3:])
        assert_near((run(attend, *x), run(gradient, *x)), expected())


def test_gradients_are_typed_as_their_operands():
    mesh = mesh_of(AxisType.Explicit, data=4, model=2)
    with jax.set_mesh(mesh):
        x = place(mesh, batch_of_eight(), (ARRAY, P("data"), P(), *PLACES[3:]))
        for grad, operand in zip(run(gradient, *x), x, strict=False):
            assert jax.typeof(grad).sharding == jax.typeof(operand).sharding


@both_kinds
@pytest.mark.parametrize("shape", [(1, 4, 20, 24), (8, 1, 20, 24), (1, 1, 1, 24)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bias_and_mask(kind, shape, dtype):
    """Dimensions that broadcast stay whole; a bias' gradient is summed over those it serves. A bias
    in float32 is left to XLA, which then divides the call by itself."""
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(shape, np.float32).astype(dtype)
    mask = rng.random((8, 1, 20, 24)) < 0.8

    def gradients(query, key, value, bias, mask):
        def call(query, key, value, bias):
            out, lse = dot_product_attention(query, key, value, bias, mask, return_residual=True)
            return jnp.sum(jnp.sin(3 * out.astype(jnp.float32))) + jnp.sum(jnp.cos(lse))

        return jax.grad(call, (0, 1, 2, 3))(query, key, value, bias)

    x = (*batch_of_eight()[:3], bias, mask)
    mesh = mesh_of(kind, data=4, model=2)
    with jax.set_mesh(mesh):
        of_bias = P("data" if shape[0] > 1 else None, "model" if shape[1] > 1 else None)
        got = run(gradients, *place(mesh, x, (ARRAY,) * 3 + (of_bias, P("data"))))
    assert_near(got, run(gradients, *x))


def test_ordinary_xla_code_has_second_derivatives():
    """implementation="xla" under explicit axes: a Hessian-vector product, as on one device."""
    x = [a.astype(np.float32) for a in batch_of_eight()[:3]]

    def product(query, key, value):
        def loss(query):
            out = dot_product_attention(query, key, value, implementation="xla")
            return jnp.sum(jnp.sin(out))

        return jax.jvp(jax.grad(loss), (query,), (query,))[1]

    want = run(product, *x)
    mesh = mesh_of(AxisType.Explicit, data=4, model=2)
    with jax.set_mesh(mesh):
        assert_near(run(product, *place(mesh, x, PLACES[:3])), want)


def test_second_derivative_of_the_kernels_raises():
    mesh = mesh_of(AxisType.Auto, data=4, model=2)
    x = place(mesh, batch_of_eight()[:3], PLACES[:3])

    def first(query, key, value):
        return jax.grad(lambda q: dot_product_attention(q, key, value).sum().astype("float32"))(
            query
        )

    with pytest.raises(NotImplementedError, match="implementation='xla'"):
        jax.jit(lambda *x: jax.jvp(first, x, x)[1])(*x)


# ---- what stands around the call


def test_the_gspmd_partitioner():
    """The older partitioner, as long as JAX has it."""
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        mesh = mesh_of(AxisType.Auto, data=4, model=2)
        x = place(mesh, batch_of_eight(), PLACES)
        programs = [compiled_for(function, *x) for function in (attend, gradient)]
        assert [collectives(program) for program in programs] == [[], []]
        assert_near(tuple(program(*x) for program in programs), expected())
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)


def test_kernels_are_called_inside_the_partitioned_operation():
    """For CUDA too, automatic axes are left to the partitioner, and what it splits is our call."""
    mesh = mesh_of(AxisType.Auto, data=4, model=2)
    x = place(mesh, batch_of_eight(), PLACES)
    text = jax.jit(gradient).trace(*x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@CustomSPMDPartitioning") == 2
    assert "jax_fa3_forward" not in text and "stablehlo.dot_general" not in text


def test_explicit_axes_export():
    mesh = mesh_of(AxisType.Explicit, data=4, model=2)
    with jax.set_mesh(mesh):
        x = place(mesh, batch_of_eight(), PLACES)
        exported = jax.export.export(jax.jit(gradient))(*x)
        again = jax.export.deserialize(exported.serialize())
        assert again.nr_devices == 8
        assert_near(run(again.call, *x), expected()[1])


def test_shard_map_exports():
    mesh = mesh_of(AxisType.Auto, data=4, model=2)
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=PLACES, out_specs=ARRAY)
    x = place(mesh, batch_of_eight(), PLACES)
    exported = jax.export.export(jax.jit(mapped))(*x)
    again = jax.export.deserialize(exported.serialize())
    assert_near(run(again.call, *x), expected()[1])


def test_automatic_axes_do_not_export():
    """JAX refuses, as the partitioning is done by a function of this process."""
    mesh = mesh_of(AxisType.Auto, data=4, model=2)
    x = place(mesh, batch_of_eight(), PLACES)
    with pytest.raises(NotImplementedError):
        jax.export.export(jax.jit(attend))(*x).serialize()


@pytest.mark.parametrize(
    ("kind", "without_pointer", "entries"),
    [
        (AxisType.Explicit, False, [1, 1]),
        (AxisType.Auto, True, [1, 1]),
        (AxisType.Auto, False, [1, 2]),
    ],
    ids=["explicit", "automatic, pointer left out", "automatic"],
)
def test_persistent_compilation_cache(tmp_path, monkeypatch, kind, without_pointer, entries):
    """Compiling again after all is forgotten finds the entry, but for automatic axes as JAX is."""
    settings = {
        "jax_remove_custom_partitioning_ptr_from_cache_key": without_pointer,
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        mesh = mesh_of(kind, data=4, model=2)

        def cached_call(*x):
            return attend(*x)

        found = []
        with jax.set_mesh(mesh):
            x = place(mesh, batch_of_eight(), PLACES)
            for _ in range(2):
                jax.clear_caches()
                assert_near(jax.jit(cached_call)(*x), expected()[0])
                found.append(len(list(tmp_path.glob("*cached_call*-cache"))))
        assert found == entries
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
