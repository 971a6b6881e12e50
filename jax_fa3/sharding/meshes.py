"""What arrays and partitioners tell of a mesh: its axes, and which of them split a dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, Sharding

Axes = tuple[str, ...]


def decode(
    sharding: Sharding | None, shape: tuple[int, ...], mesh: Mapping[str, int]
) -> tuple[Axes, ...]:
    """The mesh axes of each dimension, from what the partitioner hands to a callback: none of an
    array that it has not come to yet.

    Where that has numbers of parts only, the first free axes that make them; taking one axis for
    another of its size moves data, and is right all the same.
    """
    if sharding is None:
        return ((),) * len(shape)
    if isinstance(sharding, NamedSharding):
        return axes_by_dimension(sharding, len(shape))
    free = tuple(mesh)
    found = []
    for whole, part in zip(shape, sharding.shard_shape(shape), strict=True):
        parts = whole // part if part else 1
        runs = (free[i:j] for i in range(len(free)) for j in range(i + 1, len(free) + 1))
        axes = next((run for run in runs if math.prod(map(mesh.get, run)) == parts > 1), ())
        free = tuple(name for name in free if name not in axes)
        found.append(axes)
    return tuple(found)


def axes_by_dimension(sharding: NamedSharding, ndim: int) -> tuple[Axes, ...]:
    entries = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    return tuple(
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for entry in entries
    )


def mesh_of(operands: Sequence[jax.Array]) -> AbstractMesh:
    """The mesh in the operands' types."""
    meshes = [jax.typeof(x).sharding.mesh for x in operands]
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def axes_of(mesh: AbstractMesh, kind: AxisType) -> Axes:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, its_kind in kinds if its_kind == kind)


def typed_like(derivative: jax.Array, array: jax.Array) -> jax.Array:
    """The derivative with its array's explicit sharding, as JAX demands of custom ones."""
    sharding = jax.typeof(array).sharding
    if not axes_of(sharding.mesh, AxisType.Explicit):
        return derivative
    return jax.sharding.reshard(derivative, sharding)
