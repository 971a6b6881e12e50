"""How an operation on arrays that are sharded in any way is carried out, by the axes' kinds."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from jax_fa3.operations import first_order_only
from jax_fa3.sharding.meshes import axes_by_dimension, axes_of, decode, mesh_of
from jax_fa3.sharding.operation import Operation, Results
from jax_fa3.sharding.split import Split
from jax_fa3.varying import vary_together


def distribute(operation: Operation, operands: Sequence[jax.Array]) -> Results:
    """The operation on operands that are sharded in any way."""
    explicit = axes_of(mesh_of(operands), AxisType.Explicit)
    if operation.is_plain_xla and operation.options.sequence_parallel == "auto":
        # Ordinary XLA code, which XLA partitions, with derivatives of any order.
        return _over_explicit(operation, operands) if explicit else operation.local((), *operands)

    @custom_vmap
    def call(*operands):
        return (_over_explicit if explicit else _over_automatic)(operation, operands)

    @call.def_vmap
    def lead(size, mapped, *operands):
        """A mapped axis becomes a dimension of its own, which is split like any other. What is not
        mapped is repeated, unless it broadcasts over the batch too."""
        repeated = [
            not is_mapped and "b" in dims
            for dims, is_mapped in zip(operation.operands, mapped, strict=True)
        ]
        operands = [
            jnp.broadcast_to(x[None], (size, *x.shape)) if is_repeated else x
            for x, is_repeated in zip(operands, repeated, strict=True)
        ]
        of_mapped = operation.mapped(list(map(operator.or_, mapped, repeated)))
        return distribute(of_mapped, operands), (True,) * len(operation.results)

    return first_order_only(call)(*operands)


def _over_explicit(operation: Operation, operands: Sequence[jax.Array]) -> Results:
    """jax.shard_map over the explicit axes; automatic ones are met inside of it."""
    mesh = mesh_of(operands)
    offers = [
        (dims, axes_by_dimension(jax.typeof(x).sharding, x.ndim))
        for dims, x in zip(operation.operands, operands, strict=True)
    ]
    split = Split.settle(operation, mesh.shape, operation.extents(operands), offers)
    specs = tuple(map(split.spec, operation.operands))
    operands = [
        jax.sharding.reshard(x, NamedSharding(mesh, spec))
        for x, spec in zip(operands, specs, strict=True)
    ]

    def local(sequence, *operands):
        if sequence or operation.is_plain_xla:
            return operation.local(sequence, *operands)
        return _over_automatic(operation, operands)

    on_shard = split.on_shard(dataclasses.replace(operation, local=local))
    # No names stand for all of them but those that jax.vmap maps over, which only JAX knows.
    mixed = axes_of(mesh, AxisType.Auto)
    return jax.shard_map(
        lambda *operands: on_shard(*vary_together(operands)),
        mesh=mesh,
        in_specs=specs,
        out_specs=tuple(map(split.spec, operation.results)),
        axis_names=set(axes_of(mesh, AxisType.Explicit) if mixed else ()),
        # Where heads do not meet, results of key and value are equal on devices that share them,
        # which cannot be inferred from one custom call for all. Loops and derivative rules in a
        # user's function have constants that do not vary with its scores.
        check_vma=operation.heads_meet and operation.options.functions is None,
    )(*operands)


def _over_automatic(operation: Operation, operands: Sequence[jax.Array]) -> Results:
    """custom_partitioning over the automatic axes; on one device it is the operation itself.

    In a jax.shard_map that leaves some axes automatic, the partitioner numbers the devices of
    those axes alone and tells in how many parts, not over which axes, a dimension is split. There
    a collective would address the wrong devices.
    """
    outside = jax.sharding.get_abstract_mesh()
    automatic = {name: outside.shape[name] for name in axes_of(outside, AxisType.Auto)}
    in_shard_map = AxisType.Manual in outside.axis_types
    if in_shard_map and math.prod(automatic.values()) == 1:  # one part, which JAX refuses
        return operation.local((), *operands)
    extents = operation.extents(operands)

    def settle(mesh, arrays):
        mesh = AbstractMesh(tuple(automatic.values()), tuple(automatic)) if mesh.empty else mesh
        dims = operation.operands + operation.results
        offers = [
            (dims, decode(x.sharding, x.shape, mesh.shape))
            for dims, x in zip(dims, arrays, strict=False)
        ]
        split = Split.settle(operation, mesh.shape, extents, offers, communicates=not in_shard_map)

        def shardings(arrays):
            return tuple(NamedSharding(mesh, split.spec(dims)) for dims in arrays)

        return split, shardings(operation.operands), shardings(operation.results)

    def partition(mesh, operands, results):
        split, operand_shardings, result_shardings = settle(mesh, (*operands, *results))

        def on_shard(*operands):
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # whatever it is outside
                return split.on_shard(operation)(*operands)

        return mesh, on_shard, result_shardings, operand_shardings

    def infer_sharding_from_operands(mesh, operands, results):
        return settle(mesh, operands)[2]

    call = custom_partitioning(functools.partial(operation.local, ()))
    call.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer_sharding_from_operands,  # for GSPMD
        sharding_rule=_sharding_rule(operation, extents),  # for Shardy
    )
    return call(*operands)


def _sharding_rule(operation: Operation, extents: Mapping[str, int]) -> str:
    """Dimensions with the same letter are sharded alike.

    Query and key/value heads are dimensions of their own, unless they are equal in number: a mesh
    axis may divide the ones and not the others, which is for `Split` to settle.
    """
    letters = str.maketrans("k", "h") if extents.get("h") == extents.get("k") else {}

    def factors(dims):
        letters_of = enumerate(dims.translate(letters))
        return " ".join(f"one{i}" if letter == "." else letter for i, letter in letters_of)

    def side(arrays):
        return ", ".join(map(factors, arrays))

    return f"{side(operation.operands)} -> {side(operation.results)}"
