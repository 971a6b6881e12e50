"""How one call meets a mesh: the operations on each device's part.

All operations, forward and backward, go the same way, each by itself: which mesh axes split which
dimension is settled once (split.py), and then carried out (carry.py)

    explicit axes     by jax.shard_map over them
    automatic axes    by custom_partitioning, once XLA's partitioner has settled all shardings
    manual axes       by nobody: inside jax.shard_map and pmap the call is already local

and on a mixed mesh in that order, one inside the other. Batch and heads are split without
communication. A sequence that arrives split is left so; context_parallel exchanges what is needed.

Dimensions have the letters of operands.py; capitals are mapped axes (jax.vmap), which lead.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jax_fa3 import context_parallel, operations
from jax_fa3.float8 import rounding
from jax_fa3.operands import Bundle, Operands, Outputs, Sources, dims
from jax_fa3.operations import Operations
from jax_fa3.options import FLOAT8, AttentionOptions, Route, Routes, VisibilityOptions
from jax_fa3.sharding.carry import distribute
from jax_fa3.sharding.meshes import Axes, typed_like
from jax_fa3.sharding.operation import Operation


def forward(options: AttentionOptions, operands: Operands) -> Outputs:
    def local(sequence, operands):
        return _over(sequence, options, operands).forward(options, operands)

    results = Outputs.of_operations(options)
    return Outputs(**_divided(options, local, results, operands.needs_whole(), operands))


def backward(
    options: AttentionOptions, operands: Operands, outputs: Outputs, cotangents: Outputs
) -> Operands:
    """The gradients are sharded like their arrays. Those of sinks are made for each sequence, and
    added up by XLA, so that batches stay split where the operation cannot add over devices."""
    given, sinks = operands, operands.sinks
    if sinks is not None:
        of_sequences = jnp.broadcast_to(sinks, (operands.query.shape[0], sinks.shape[1]))
        operands = operands.replace(sinks=of_sequences)

    def local(sequence, operands, *rest):
        return _over(sequence, options, operands).backward(options, operands, *rest)

    differentiable = operands.differentiable(options)
    results = dict(zip(differentiable.present(), differentiable.dims(), strict=True))
    bundles = (operands, outputs, cotangents)
    gradients = _divided(options, local, results, operands.needs_whole(), *bundles, are_shares=True)
    if sinks is not None:
        gradients["sinks"] = gradients["sinks"].sum(0, keepdims=True)
    typed = {name: typed_like(x, getattr(given, name)) for name, x in gradients.items()}
    return type(operands)(**typed)


def quantized(operands: Operands, *, seed: int, prepare_value: bool) -> Operands:
    """float8 arrays with measured scales by blocks."""
    options = AttentionOptions(scale=1.0, forward_dtype=FLOAT8)

    def local(sequence, operands):
        return operations.quantized(options, operands, seed=seed, prepare_value=prepare_value)

    rows = Operands.rows()
    value = "prepared_value" if prepare_value else "value"
    results = {name: rows[name].dims for name in ("query", "key", value, *rounding.DESCALES)}
    blocks = "scales for blocks of rows"
    return Operands(**_divided(options, local, results, blocks, operands, heads_meet=False))


def visibility(route: Route, options: VisibilityOptions, sources: Sources) -> Operands:
    """A table of visibility, split over batch and heads as its sources are."""

    def local(sequence, sources):
        return operations.visibility(route, options, sources)

    _, heads = sources.batch_and_heads
    results = dict(visibility="bhv" if heads > 1 else "b.v")
    call = AttentionOptions(scale=1.0, routes=Routes(route, route))
    return Operands(**_divided(call, local, results, "segment ids", sources))


def _over(sequence: Axes, options: AttentionOptions, operands: Operands) -> Operations:
    """The operations on one device, where mesh axes split the query and key rows, if any do."""
    if not sequence:
        return operations
    strategy = options.sequence_parallel
    if strategy == "auto":
        strategy = context_parallel.choose(options, operands, lax.axis_size(sequence))
    return context_parallel.Divided(strategy, sequence)


def _divided(
    options: AttentionOptions,
    local: Callable[..., Bundle],
    results: dict[str, str],
    needs_whole: str | None,
    *bundles: Bundle,
    heads_meet: bool = True,
    are_shares: bool = False,
) -> dict[str, jax.Array]:
    """local(sequence, *bundles), divided over the mesh; `results`: its arrays' dimensions."""
    arrays, tree = jax.tree.flatten(bundles)

    def local_arrays(sequence, *arrays):
        present = local(sequence, *tree.unflatten(arrays)).present()
        return tuple(present[name] for name in results)

    operation = Operation(
        options,
        local_arrays,
        dims(*bundles),
        tuple(results.values()),
        needs_whole,
        heads_meet,
        are_shares,
    )
    return dict(zip(results, distribute(operation, arrays), strict=True))
