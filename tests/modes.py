"""Every kind of mesh and every transform, for batch and heads split: test_modes.py runs them on
simulated devices, gpu/test_mesh.py with the kernels on GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_fa3 import dot_product_attention
from meshes import place, run

ARRAY = P("data", None, "model")  # batch and heads
INDEX = {1: P("data"), 2: P("data"), 3: P("data", "model")}  # by rank; the last has heads

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
BOTH = frozenset(("data", "model"))
MODES = {  # kinds of the axes data and model; those a shard_map makes manual
    "automatic": ((AUTO, AUTO), None),
    "explicit": ((EXPLICIT, EXPLICIT), None),
    "automatic and explicit": ((AUTO, EXPLICIT), None),
    "explicit and automatic": ((EXPLICIT, AUTO), None),
    "manual": ((AUTO, AUTO), BOTH),
    "manual batch": ((AUTO, AUTO), frozenset(("data",))),
    "manual heads": ((AUTO, AUTO), frozenset(("model",))),
}
TRANSFORMS = ("forward", "gradients", "results_and_gradients", "scan_of_remat", "mapped")


class Problem:
    """A case that has index arrays, under each transform.

    The transforms take `operands`: query, key, value, the cotangents of both results, and the index
    arrays. What they return has dimensions batch, sequence and heads first. The cotangents are
    operands, so that nothing but attention stands between one device's bits and another's.
    """

    def __init__(self, case, implementation=None):
        self.case, self.implementation = case, implementation

    @functools.cached_property
    def operands(self):
        return *self.case.inputs(), *self.case.index_arrays.values()

    @functools.cached_property
    def places(self):
        index = self.case.index_arrays.values()
        return (ARRAY,) * 5 + tuple(INDEX[x.ndim] for x in index)

    @functools.cache  # noqa: B019  (lives as long as the session)
    def expected(self, transform):
        """The results on one device."""
        return jax.tree.map(np.asarray, run(getattr(self, transform), *self.operands))

    def attend(self, query, key, value, *index):
        """Output and LSE; -inf made a number so that results can be subtracted."""
        out, lse = dot_product_attention(
            query,
            key,
            value,
            return_residual=True,
            implementation=self.implementation,
            **self.case.options,
            **dict(zip(self.case.index_arrays, index, strict=True)),
        )
        return out, jnp.where(jnp.isneginf(lse), -1.0, lse)

    def forward(self, query, key, value, dout, dlse, *index):
        return self.attend(query, key, value, *index)

    def gradients(self, query, key, value, dout, dlse, *index):
        """Of the output alone."""
        _, vjp = jax.vjp(lambda *x: self.attend(*x, *index)[0], query, key, value)
        return vjp(dout)

    def results_and_gradients(self, query, key, value, dout, dlse, *index):
        results, vjp = jax.vjp(lambda *x: self.attend(*x, *index), query, key, value)
        return *results, *vjp((dout, dlse))

    def scan_of_remat(self, query, key, value, dout, dlse, *index):
        """Gradients through two layers, each forgetting what is inside."""

        def layers(query, key, value):
            def layer(query, _):
                return self.attend(query, key, value, *index)[0], None

            return jax.lax.scan(jax.checkpoint(layer), query, None, length=2)[0]

        return jax.vjp(layers, query, key, value)[1](dout)

    def mapped(self, query, key, value, dout, dlse, *index):
        """vmap of some operands, along different axes."""
        *others, last = index
        results = jax.vmap(
            self.results_and_gradients,
            in_axes=(1, None, 0, None, None, *[None] * len(others), 0),
        )(
            jnp.stack([query, -query], 1),
            key,
            jnp.stack([value, value + 1]),
            dout,
            dlse,
            *others,
            jnp.stack([last, last + 1]),
        )
        return jax.tree.map(lambda x: x[1], results)

    def on_mesh(self, mode, shape, transform, *, check_vma=True):
        """(mesh, function, operands on it) for a mode, over shape = (data, model) devices."""
        kinds, manual = MODES[mode]
        devices = jax.devices()[: np.prod(shape)]
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=kinds, devices=devices)
        function = getattr(self, transform)
        if manual:
            function = jax.shard_map(
                function,
                mesh=mesh,
                in_specs=tuple(_of_manual(spec, manual) for spec in self.places),
                out_specs=_of_manual(ARRAY, manual),
                axis_names=manual,
                check_vma=check_vma,
            )
        return mesh, function, place(mesh, self.operands, self.places)

    def pmapped(self, transform, devices):
        """The results of jax.pmap over the first devices, each with its part of the batch."""
        parts = [x.reshape(devices, -1, *x.shape[1:]) for x in self.operands]
        mapped = jax.pmap(getattr(self, transform), devices=jax.devices()[:devices])
        return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), mapped(*parts))


def checks(mode):
    """The values of check_vma that a mode has."""
    return (True, False) if MODES[mode][1] else (True,)


def assert_split(mesh, results):
    """Batch and heads of every result are divided over the mesh."""
    for x in jax.tree.leaves(results):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, ARRAY), x.ndim), x.sharding


def _of_manual(spec, names):
    return P(*(name if name in names else None for name in spec))
