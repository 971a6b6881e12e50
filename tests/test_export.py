"""jax.export of the call: artefacts for this machine, and for a GPU it does not have."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_fa3
from jax_fa3 import dot_product_attention, export_checks
from transforms import assert_near, attend, gradient, jitted, operands, score

ROOT = pathlib.Path(__file__).parents[1]


def test_export_round_trip():
    x = operands()
    exported = export.export(jax.jit(attend))(*x)
    again = export.deserialize(exported.serialize(vjp_order=1))
    assert_near(again.call(*x), jitted(attend)(*x))

    def exported_loss(*x):
        return score(*again.call(*x))

    assert_near(jax.grad(exported_loss, argnums=(0, 1, 2))(*x), jitted(gradient)(*x))


def test_export_for_two_platforms_without_a_gpu():
    """One artefact for the CPU and for CUDA, with the kernels' calls inside."""
    x = operands()
    exported = export.export(
        jax.jit(gradient), platforms=("cpu", "cuda"), disabled_checks=jax_fa3.DISABLED_CHECKS
    )(*x)
    text = exported.mlir_module()
    assert "@jax_fa3_forward" in text and "@jax_fa3_backward" in text
    again = export.deserialize(exported.serialize())
    assert_near(again.call(*x), jitted(gradient)(*x))


def test_the_checks_are_those_of_all_custom_calls():
    """As the sources bind them, whichever of them this module was built with."""
    sources = "".join(path.read_text() for path in (ROOT / "src").rglob("*.[ch]*"))
    bound = set(re.findall(r'"(jax_fa3_\w+)"', sources))
    assert bound == set(export_checks.TARGETS)
    checks = [check.is_custom_call() for check in jax_fa3.DISABLED_CHECKS]
    assert checks == list(export_checks.TARGETS)


# ---- symbolic dimensions


def general(call, dims, constraints=(), dtype="float32", arrays=lambda b, t, s: ()):
    """call(query, key, value, *arrays) exported for the dimensions "b, t, s"."""
    b, t, s = export.symbolic_shape(dims, constraints=constraints)
    query, key = (jax.ShapeDtypeStruct((b, n, h, 16), dtype) for n, h in ((t, 4), (s, 2)))
    types = [jax.ShapeDtypeStruct(*x) for x in arrays(b, t, s)]
    program = export.export(jax.jit(call))(query, key, key, *types)
    return export.deserialize(program.serialize())


def inputs(b, t, s):
    rng = np.random.default_rng(0)
    shapes = ((b, t, 4, 16), (b, s, 2, 16), (b, s, 2, 16))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def total(call, *x):
    return jnp.sum(jnp.sin(call(*x)))


@pytest.mark.parametrize("bound", [(), ("t <= 4096", "s <= 4096")], ids=["free", "bounded"])
def test_symbolic_lengths(bound):
    """As direct calls, forward and gradient; a promise is that of JAX's symbols."""

    def call(query, key, value, bias, lengths):
        options = dict(is_causal=True, query_offset=lengths - 3, key_value_seq_lengths=lengths)
        return dot_product_attention(query, key, value, bias, **options)

    gradients = jax.grad(functools.partial(total, call), (0, 1, 2, 3))
    function = call if bound else gradients
    program = general(
        function, "b, t, s", bound, arrays=lambda b, t, s: (((4, t, s), "float32"), ((b,), "int32"))
    )
    for b, t, s in ((2, 5, 300), (1, 9, 1)):
        lengths = np.arange(s, s - b, -1, dtype=np.int32)
        bias = np.random.default_rng(1).standard_normal((4, t, s)).astype(np.float32)
        x = (*inputs(b, t, s), bias, lengths)
        got, want = (jax.tree.leaves(f(*x)) for f in (program.call, jax.jit(function)))
        for mine, other in zip(got, want, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


def test_symbolic_lengths_take_linear_memory():
    def call(query, key, value):
        return jax.grad(functools.partial(total, dot_product_attention), (0, 1, 2))(
            query, key, value
        )

    program = general(call, "1, t, t")
    x = inputs(1, 2048, 2048)
    compiled = jax.jit(program.call).lower(*x).compile()
    scores = 4 * 2048 * 2048 * np.float32().itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 2


def test_what_needs_static_lengths_says_so():
    def call(query, key, value, **options):
        return dot_product_attention(query, key, value, **options)

    with pytest.raises(NotImplementedError, match="the kernels need static shapes, not query of"):
        general(functools.partial(call, implementation="fa3"), "b, t, s", dtype="bfloat16")
    with pytest.raises(
        NotImplementedError, match="attention_chunk needs static .* not t query rows"
    ):
        general(functools.partial(call, attention_chunk=8), "b, t, s")
    with pytest.raises(NotImplementedError, match="forward_dtype needs static .* not t query rows"):
        rounded = functools.partial(call, forward_dtype="float8_e4m3fn")
        general(rounded, "b, t, s", dtype="bfloat16")


# ---- meshes


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_meshes(kind):
    """Where JAX refuses, docs/errors.md has its words."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    split = jax.NamedSharding(mesh, jax.P("x"))
    x = jax.ShapeDtypeStruct((2, 8, 2, 16), "bfloat16", sharding=split)

    def exported(implementation=None):
        call = functools.partial(dot_product_attention, implementation=implementation)
        with jax.set_mesh(mesh):
            return export.export(jax.jit(call))(x, x, x)

    exported("xla")
    if kind == "Explicit":
        exported()
        return
    with pytest.raises(NotImplementedError) as raised:
        exported()
    assert str(raised.value) in (ROOT / "docs/errors.md").read_text()


def test_the_examples_run(tmp_path):
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    names = {}
    for program in programs:
        exec(program, names)
    assert "jax_fa3_backward" in names["program"].mlir_module()
    assert names["general"].in_avals[0].shape[1] == names["rows"]
