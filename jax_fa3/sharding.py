"""How one call meets a mesh.

Inside jax.shard_map and pmap (manual axes) the call is already local: the operands are made to
vary over the same axes, so that JAX inserts the sums of replicated operands' gradients. Explicit
axes are wrapped in jax.shard_map here, over batch and whole key/value heads; everything else is
gathered. Under automatic axes the call goes straight through.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_fa3.options import Dense, Index

Axes = tuple[str, ...]


def distribute(
    core: Callable[..., tuple[jax.Array, ...]],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: Index,
    dense: Dense,
    *,
    num_results: int,
) -> tuple[jax.Array, ...]:
    """core(query, key, value, index, dense), a prefix of (out, lse), on each device's part.

    Batch and heads lead out [batch, seq, heads, ...] and lse [batch, heads, seq].
    """
    operands = (query, key, value, index, dense)
    mesh = jax.typeof(query).sharding.mesh
    explicit = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    ]
    if not explicit:
        return core(*_align(operands))

    batch, heads = _split(mesh, query, key, value)
    heads_third = PartitionSpec(batch, None, heads, None)

    def dense_spec(x):
        return PartitionSpec(batch if x.shape[0] > 1 else None, heads if x.shape[1] > 1 else None)

    specs = (
        *(heads_third for _ in range(3)),
        jax.tree.map(lambda x: PartitionSpec(batch), index),
        jax.tree.map(dense_spec, dense),
    )
    operands = jax.tree.map(
        lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)), operands, specs
    )
    return jax.shard_map(
        lambda *local: core(*_align(local)),
        mesh=mesh,
        in_specs=specs,
        out_specs=(heads_third, PartitionSpec(batch, heads))[:num_results],
        axis_names=set(explicit),
    )(*operands)


def _align(operands: Any) -> Any:
    """The operands, all varying over the union of their varying manual axes."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(operands)]
    union = frozenset().union(*varying)

    def cast(x):
        missing = tuple(sorted(union - jax.typeof(x).manual_axis_type.varying))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, operands)


def _split(mesh, query: jax.Array, *key_value: jax.Array) -> tuple[Axes | None, Axes | None]:
    """Mesh axes over which the batch and the heads are split: the first operand's that has any.

    Heads are split only where every device gets whole key/value heads with their query heads.
    """
    specs = [jax.typeof(x).sharding.spec for x in (query, *key_value)]
    batch = next((_axes(spec[0]) for spec in specs if spec[0] is not None), ())
    for spec in specs:
        heads = tuple(name for name in _axes(spec[2]) if name not in batch)
        parts = math.prod(mesh.shape[name] for name in heads)
        if heads and key_value[0].shape[2] % parts == 0:
            return batch or None, heads
    return batch or None, None


def _axes(entry: str | Axes | None) -> Axes:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
