"""What the tests on several devices share, on simulated ones and on GPUs: meshes, arrays on them,
and a case run over a mesh against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import contract
import jax_fa3
import packed
from jax_fa3 import dot_product_attention
from oracle import Results

KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
both_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

STRATEGIES = {
    "ring": jax_fa3.ring_attention,
    "allgather": jax_fa3.allgather_attention,
    "ulysses": jax_fa3.ulysses_attention,
}
LAYOUTS = ("contiguous", "zigzag")
PART = P(None, "seq")


def mesh_of(kind=AxisType.Auto, /, **sizes):
    """A mesh of the first devices, all axes of one kind."""
    count = int(np.prod(list(sizes.values())))
    kinds, devices = (kind,) * len(sizes), jax.devices()[:count]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def place(mesh, arrays, places):
    return [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, places, strict=True)
    ]


def compiled_for(function, *x):
    """On the CPU with little optimization, which takes most of the time there."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function).lower(*x).compile(compiler_options=options)


def run(function, *x):
    return compiled_for(function, *x)(*x)


def vector_jacobian(case, **options):
    """Results and gradients of a case as a function of its inputs."""

    def results(query, key, value, dout, dlse):
        def call(*x):
            return dot_product_attention(
                *x, return_residual=True, **case.options, **case.index_arrays, **options
            )

        primals, vjp = jax.vjp(call, query, key, value)
        return *primals, *vjp((dout, dlse))

    return results


def check_heads(kind, case, devices, **options):
    """A case with its query heads split and its key heads on every device, against the oracle;
    returns the compiled program."""
    mesh, split = mesh_of(kind, model=devices), P(None, None, "model")
    with jax.set_mesh(mesh):
        x = place(mesh, case.inputs(), (split, P(), P(), split, split))
        compiled = compiled_for(vector_jacobian(case, **options), *x)
        results = compiled(*x)
    contract.compare(case, case.inputs(), Results(*map(np.asarray, results)))
    return compiled


def check_sequence(mesh, case, split, *, keys=None, **options):
    """A case with its sequence split as `split` says, against the oracle; returns the compiled
    program."""
    keys = split if keys is None else keys
    with jax.set_mesh(mesh):
        x = place(mesh, case.inputs(), (split, keys, keys, split, P(*split[:3])))
        compiled = compiled_for(vector_jacobian(case, **options), *x)
        results = compiled(*x)
    contract.compare(case, case.inputs(), Results(*map(np.asarray, results)))
    assert results[0].sharding.spec[1] == split[1]
    return compiled


PERMUTE = {"zigzag": jax_fa3.zigzag_permute, "striped": jax_fa3.striped_permute}


def in_layout(layout, size, x, inverse=False, dim=1):
    """[batch, seq, ...] in natural order to that of the layout, or back."""
    if layout == "contiguous" or x.shape[dim] == 0:
        return x
    order = np.asarray(PERMUTE[layout](jnp.arange(x.shape[dim]), 0, size))
    return np.take(x, np.argsort(order) if inverse else order, dim)


def strategy_call(case, strategy, layout, **options):
    """Results and gradients of a case on one device of the mesh axis seq, as a function of its part
    of the inputs and of the index arrays."""

    def results(query, key, value, dout, dlse, index):
        attend = functools.partial(
            STRATEGIES[strategy],
            axis_name="seq",
            layout=layout,
            return_residual=True,
            **case.options,
            **index,
            **options,
        )
        primals, vjp = jax.vjp(attend, query, key, value)
        return *primals, *vjp((dout, dlse))

    return results


def strategy_program(case, strategy, layout, size, *, check_vma=True, **options):
    """(function, arguments) of a strategy's results and gradients over `size` devices."""
    index = case.index_arrays
    of_index = {name: P() for name in index}
    for name in index.keys() & packed.TOLD:
        of_index[name] = P(*[None] * (index[name].ndim - 1), "seq")
        index[name] = in_layout(layout, size, index[name], dim=-1)
    mapped = jax.shard_map(
        strategy_call(case, strategy, layout, **options),
        mesh=mesh_of(seq=size),
        in_specs=(*(PART,) * 5, of_index),
        out_specs=PART,
        check_vma=check_vma,
    )
    inputs = case.inputs()
    if case.query_lengths or case.key_lengths or case.has_visibility:
        inputs = contract.spoil_padding(case, inputs)
    return mapped, (*(in_layout(layout, size, x) for x in inputs), index)


def check_strategy(case, strategy, layout, size, **options):
    """Output, LSE and gradients of a case over `size` devices, against the oracle."""
    function, x = strategy_program(case, strategy, layout, size, **options)
    got = run(function, *x)
    got = Results(*(in_layout(layout, size, np.asarray(x), inverse=True) for x in got))
    contract.compare(case, case.inputs(), got)
