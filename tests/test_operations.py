"""The operations on one device: folding of mapped axes, what their rules hold, and how often a plan
is made."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning

from jax_fa3 import dot_product_attention, native, operations, xla
from jax_fa3.operands import Operands, Outputs
from jax_fa3.options import AttentionOptions
from jax_fa3.sharding import carry
from programs import custom_calls, lower

OPTIONS = AttentionOptions(scale=0.25, window_right=0)


def problem(batch, size):
    """Operands with a leading axis of `size`, their outputs' cotangents, and the bias's batch."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    query, dout = (normal(size, 2, 9, 4, 8) for _ in range(2))
    key, value = (normal(size, 2, 7, 2, 8) for _ in range(2))
    mask = normal(size, 1, 1, 9, 7) > -1
    operands = Operands(query, key, value, bias=normal(size, batch, 4, 9, 1), mask=mask)
    return operands, Outputs(dout, normal(size, 2, 4, 9))


def results(run, operands, cotangents):
    """Outputs and gradients, through `run`, which has a rule for mapped axes or not."""
    forward, backward = (functools.partial(f, OPTIONS) for f in (xla.forward, xla.backward))
    outputs = run(forward, operands)
    return outputs, run(backward, operands, outputs, cotangents)


def folded(function, *bundles):
    is_backward = len(bundles) > 1
    differentiated = bundles[0].differentiable(OPTIONS).present() if is_backward else ()
    return operations._run("auto", function, function, *bundles, differentiated=differentiated)


@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("shared", ((), ("bias",), ("mask",), ("bias", "mask"), ("key",)), ids=str)
def test_mapped_arrays_that_broadcast_over_the_batch(batch, shared):
    """A bias for all sequences, mapped or not, has its own gradient in every mapped call."""
    operands, cotangents = problem(batch, 3)
    operands = operands.replace(**{name: getattr(operands, name)[0] for name in shared})
    axes = Operands(**{name: None if name in shared else 0 for name in operands.present()})
    mapped = jax.vmap(functools.partial(results, folded), in_axes=(axes, 0))
    got = jax.jit(mapped)(operands, cotangents)
    for i in range(3):
        one = {name: x if name in shared else x[i] for name, x in operands.present().items()}
        own = Outputs(cotangents.out[i], cotangents.lse[i])
        want = results(lambda f, *x: f(*x), Operands(**one), own)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g[i], w, rtol=1e-5, atol=1e-5)


def test_a_gradient_in_float8_plans_each_kernel_once(monkeypatch):
    plans = []

    class Counting:
        def __getattr__(self, name):
            return counted if name == "plan" else getattr(module, name)

    def counted(family, **choices):
        plans.append(family)
        return module.plan(family, **choices)

    module = native.module()
    monkeypatch.setattr(native, "_C", Counting())
    native._plan.cache_clear()
    x = [jax.ShapeDtypeStruct((2, 40, 4, 64), "bfloat16")] * 3

    def loss(*x):
        out = dot_product_attention(*x, forward_dtype="float8_e4m3fn")
        return out.astype(jnp.float32).sum()

    assert len(custom_calls(lower(jax.grad(loss, (0, 1, 2)), *x))) == 4
    assert sorted(plans) == ["backward", "forward", "forward_float8"]


def tracers_in(x, seen=None):
    """The tracers that a function holds in its closure and bound arguments, and in their parts."""
    seen = set() if seen is None else seen
    if id(x) in seen:
        return []
    seen.add(id(x))
    if isinstance(x, jax.core.Tracer):
        return [x]
    if isinstance(x, functools.partial):
        held = (x.func, x.args, x.keywords)
    elif inspect.isfunction(x):
        held = [cell.cell_contents for cell in x.__closure__ or ()]
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        held = [getattr(x, field.name) for field in dataclasses.fields(x)]
    elif isinstance(x, (tuple, list)):
        held = x
    else:
        held = x.values() if isinstance(x, dict) else ()
    return [tracer for part in held for tracer in tracers_in(part, seen)]


def test_tracers_are_found():
    def holds(x):
        return len(tracers_in(functools.partial(lambda y: x + y)))

    assert jax.eval_shape(lambda x: jnp.zeros(holds(x)), 1.0).shape == (1,)


@pytest.mark.parametrize(
    "options",
    [
        dict(is_causal=True),
        dict(forward_dtype="float8_e4m3fn"),
        dict(forward_dtype="float8_e4m3fn", mask=True),
        dict(implementation="xla", sequence_parallel="ring"),
        dict(query_segment_ids=True, forward_dtype="float8_e4m3fn"),
    ],
    ids=str,
)
def test_rules_hold_no_tracers(monkeypatch, options):
    """What JAX keeps to run again under another transformation has all arrays as arguments."""
    wrapped = []

    def checked(decorator):
        def decorate(function, *rest, **more):
            assert not tracers_in(function), function
            wrapped.append(function)
            return decorator(function, *rest, **more)

        return decorate

    for module in (operations, carry):
        monkeypatch.setattr(module, "custom_vmap", checked(custom_vmap))
    monkeypatch.setattr(carry, "custom_partitioning", checked(custom_partitioning))
    monkeypatch.setattr(jax, "custom_jvp", checked(jax.custom_jvp))
    query = jax.ShapeDtypeStruct((2, 16, 4, 64), "bfloat16")
    lengths = jax.ShapeDtypeStruct((2,), "int32")
    mask = jax.ShapeDtypeStruct((1, 1, 16, 16), "bool")
    ids = jax.ShapeDtypeStruct((2, 16), "int32")

    def loss(query, key, value, lengths, mask, ids):
        given = dict(options, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
        if "mask" in options:
            given["mask"] = mask
        if "query_segment_ids" in options:
            given["query_segment_ids"] = ids
        return dot_product_attention(query, key, value, **given).astype(jnp.float32).sum()

    gradient = jax.grad(loss, (0, 1, 2))
    jax.make_jaxpr(gradient)(query, query, query, lengths, mask, ids)
    assert wrapped
