"""How one call meets a mesh: the operations of calls.py and context.py on each device's part.

Both operations, forward and backward, go the same way, each by itself: which mesh axes split which
dimension is settled once (`_Split`), and then carried out

    explicit axes     by jax.shard_map over them
    automatic axes    by custom_partitioning, when XLA's partitioner has settled all shardings
    manual axes       by nobody: inside jax.shard_map and pmap the call is already local

and, on a mixed mesh, in that order. Batch and heads are split without communication. A sequence
that arrives split is left so, and the strategies of context.py exchange what is needed.

Dimensions have letters: b batch, s query rows, t key rows, h query heads, k key/value heads,
d head_dim, e head_dim of value; capitals are mapped axes (jax.vmap), which lead; a dot is a
dimension of extent 1 that broadcasts.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, Sharding

from jax_fa3 import calls
from jax_fa3.options import AttentionOptions, Dense, Index

Axes = tuple[str, ...]

QUERY, KEY, VALUE, OUT, LSE, INDEX = "bshd", "btkd", "btke", "bshe", "bhs", "b"


def forward(
    options: AttentionOptions,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: Index,
    dense: Dense,
) -> tuple[jax.Array, jax.Array]:
    """out [batch, seqlen_q, num_heads_q, head_dim_v] and lse [batch, num_heads_q, seqlen_q]."""
    operands, tree = jax.tree.flatten((query, key, value, index, dense))

    def local(*operands):
        return calls.forward(options, *tree.unflatten(operands))

    dims = (QUERY, KEY, VALUE, *_index_and_dense_dims(index, dense))
    return _distribute(_Operation(options, local, dims, (OUT, LSE)), *operands)


def backward(
    options: AttentionOptions,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
    index: Index,
    dense: Dense,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of query, key, value and, where there is one, of the bias, typed as these are."""
    operands, tree = jax.tree.flatten((query, key, value, out, lse, dout, dlse, index, dense))
    differentiable = [x for x in (query, key, value, dense.bias) if x is not None]

    def local(*operands):
        return calls.backward(options, *tree.unflatten(operands))[: len(differentiable)]

    cotangents = (OUT,) if dlse is None else (OUT, LSE)
    others = _index_and_dense_dims(index, dense)
    dims = (QUERY, KEY, VALUE, OUT, LSE, *cotangents, *others)
    bias = _index_and_dense_dims(Index(), Dense(bias=dense.bias))
    operation = _Operation(options, local, dims, (QUERY, KEY, VALUE, *bias))
    gradients = map(_typed_like, _distribute(operation, *operands), differentiable)
    return (*gradients, None)[:4]


def align(operands: Any) -> Any:
    """The operands, all varying over the union of their varying manual axes.

    Outside of the custom_vjp, so that JAX sums the gradients of operands that were replicated.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(operands)]
    union = frozenset().union(*varying)

    def cast(x):
        missing = tuple(sorted(union - jax.typeof(x).manual_axis_type.varying))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, operands)


@dataclasses.dataclass(frozen=True)
class _Operation:
    """A forward or backward operation: local(*operands), and its dimensions."""

    options: AttentionOptions
    local: Callable[..., tuple[jax.Array, ...]]
    operands: tuple[str, ...]
    results: tuple[str, ...]

    def mapped(self) -> _Operation:
        """The operation over one more leading axis."""
        letter = string.ascii_uppercase[len(self.operands[0]) - len(QUERY)]

        return dataclasses.replace(
            self,
            local=jax.vmap(self.local),
            operands=tuple(letter + dims for dims in self.operands),
            results=tuple(letter + dims for dims in self.results),
        )

    def extents(self, operands: Sequence[Any]) -> dict[str, int]:
        """The extent of every dimension."""
        return {
            letter: size
            for dims, x in zip(self.operands, operands, strict=True)
            for letter, size in zip(dims, x.shape, strict=True)
            if letter != "."
        }


@dataclasses.dataclass(frozen=True)
class _Split:
    """Which mesh axes split each dimension of a call; dimensions left out are whole."""

    axes: Mapping[str, Axes]
    mesh: Mapping[str, int]  # axis name -> size
    extents: Mapping[str, int]  # dimension -> extent before the split

    @classmethod
    def settle(
        cls,
        operation: _Operation,
        mesh: Mapping[str, int],
        extents: Mapping[str, int],
        offers: Sequence[tuple[str, Sequence[Axes]]],
        *,
        communicates: bool = True,
    ) -> _Split:
        """The split that `offers` ask for: for each array, its dimensions and their mesh axes.

        A dimension is split as finely as any array that has it is; an array that was split less
        follows without communication. Batch goes before heads, and heads before the sequence,
        where they ask for the same mesh axis. Without `communicates`, key/value heads are split
        wherever query heads are.
        """
        split = cls({}, mesh, extents)
        batch = operation.operands[0][:-3]
        for letter, asking in (*zip(batch, batch, strict=True), ("h", "hk")):
            proposals = [
                split._fitting(letter, axes)
                for dims, entries in offers
                for dim, axes in zip(dims, entries, strict=True)
                if dim in asking
            ]
            split.axes[letter] = max(proposals, key=split._parts_of)
            if letter == "h":
                split.axes["k"] = split._prefix("k", split.axes["h"])
                if not communicates:
                    split.axes["h"] = split.axes["k"]
        return split

    def spec(self, dims: str) -> PartitionSpec:
        return PartitionSpec(*(self.axes.get(letter) or None for letter in dims))

    def on_shard(self, operation: _Operation) -> Callable[..., tuple[jax.Array, ...]]:
        """The operation on one device's part of every operand."""

        def body(*operands):
            operands = map(self._select_heads, operands, operation.operands)
            return tuple(map(self._collect, operation.local(*operands), operation.results))

        return body

    def _fitting(self, letter: str, axes: Axes) -> Axes:
        """The first of `axes`, those in use left out, that split the dimension evenly."""
        used = {name for taken in self.axes.values() for name in taken}
        return self._prefix(letter, tuple(name for name in axes if name not in used))

    def _prefix(self, letter: str, axes: Axes) -> Axes:
        while self.extents[letter] % self._parts_of(axes):
            axes = axes[:-1]
        return axes

    def _parts_of(self, axes: Axes) -> int:
        return math.prod(self.mesh[name] for name in axes)

    def _key_heads(self) -> jax.Array:
        """Which of its key/value heads this device's query heads need, in order.

        With more devices than key/value heads, each device has some query heads of one group, or
        the end of one group and the start of the next; the largest runs of query heads that
        never straddle two groups become the groups of the local call.
        """
        local_heads = self.extents["h"] // self._parts_of(self.axes["h"])
        group = self.extents["h"] // self.extents["k"]
        run = math.gcd(local_heads, group)
        first = lax.axis_index(self.axes["h"]) * local_heads
        heads = (first + run * jnp.arange(local_heads // run)) // group
        if self.axes["k"]:
            heads -= lax.axis_index(self.axes["k"]) * self._local_key_heads()
        return heads

    def _local_key_heads(self) -> int:
        return self.extents["k"] // self._parts_of(self.axes["k"])

    def _select_heads(self, x: jax.Array, dims: str) -> jax.Array:
        if "k" not in dims or self.axes["h"] == self.axes["k"]:
            return x
        return jnp.take(x, self._key_heads(), axis=-2, mode="clip")

    def _collect(self, x: jax.Array, dims: str) -> jax.Array:
        """The transpose of replicating an operand and selecting its heads, summed in float32."""
        own = {name for letter in dims for name in self.axes.get(letter, ())}
        others = [name for names in self.axes.values() for name in names if name not in own]
        if not others:
            return x
        total = x.astype(jnp.float32)
        if "k" in dims:
            zeros = jnp.zeros((*x.shape[:-2], self._local_key_heads(), x.shape[-1]), jnp.float32)
            total = zeros.at[..., self._key_heads(), :].add(total)
        return lax.psum(total, tuple(dict.fromkeys(others))).astype(x.dtype)


def _distribute(operation: _Operation, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """The operation on operands that are sharded in any way, with a rule for mapped axes."""
    carry = _over_explicit_axes if _explicit_axes(operands) else _over_automatic_axes
    if operation.options.route == "xla":  # stays ordinary XLA code, with all its derivatives
        return (
            carry(operation, operands) if _explicit_axes(operands) else operation.local(*operands)
        )

    @custom_vmap
    def call(*operands):
        return carry(operation, operands)

    @call.def_vmap
    def lead(size, mapped, *operands):
        """A mapped axis becomes a dimension of its own, which may be split like any other."""
        operands = [
            x if is_mapped else jnp.broadcast_to(x[None], (size, *x.shape))
            for x, is_mapped in zip(operands, mapped, strict=True)
        ]
        return _distribute(operation.mapped(), *operands), (True,) * len(operation.results)

    return calls.first_order_only(call)(*operands)


def _over_explicit_axes(
    operation: _Operation, operands: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """jax.shard_map over the explicit axes; automatic ones are met inside of it."""
    mesh, names = _mesh(operands), _explicit_axes(operands)
    offers = [
        (dims, _spec(jax.typeof(x).sharding, x.ndim))
        for dims, x in zip(operation.operands, operands, strict=True)
    ]
    split = _Split.settle(operation, mesh.shape, operation.extents(operands), offers)
    specs = tuple(map(split.spec, operation.operands))
    operands = [
        jax.sharding.reshard(x, NamedSharding(mesh, spec))
        for x, spec in zip(operands, specs, strict=True)
    ]
    local = operation
    if operation.options.route != "xla":
        local = dataclasses.replace(operation, local=lambda *x: _over_automatic_axes(operation, x))
    return jax.shard_map(
        lambda *x: split.on_shard(local)(*align(x)),
        mesh=mesh,
        in_specs=specs,
        out_specs=tuple(map(split.spec, operation.results)),
        axis_names=set(names),
    )(*operands)


def _over_automatic_axes(
    operation: _Operation, operands: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """custom_partitioning over the automatic axes; without a mesh it is the operation itself.

    Under a jax.shard_map that leaves axes automatic, the partitioner numbers the devices of these
    axes alone and tells in how many parts, not over which axes, a dimension is split. There a
    collective would address wrong devices, so no split is chosen that needs one.
    """
    context = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(context.axis_names, context.axis_types, strict=True))
    partly_manual = AxisType.Manual in kinds.values()
    automatic = {name: context.shape[name] for name in kinds if kinds[name] == AxisType.Auto}
    if partly_manual and not automatic:
        return operation.local(*operands)

    extents = operation.extents(operands)

    def settle(mesh, *arrays):
        if mesh.empty:
            mesh = AbstractMesh(tuple(automatic.values()), tuple(automatic))
        offers = [
            (dims, _decode(x.sharding, x.shape, mesh.shape))
            for dims, x in zip((*operation.operands, *operation.results), arrays, strict=False)
        ]
        split = _Split.settle(
            operation, mesh.shape, extents, offers, communicates=not partly_manual
        )

        def shardings(all_dims):
            return tuple(NamedSharding(mesh, split.spec(dims)) for dims in all_dims)

        return split, shardings(operation.operands), shardings(operation.results)

    def partition(mesh, operands, results):
        split, operand_shardings, result_shardings = settle(mesh, *operands, *results)
        return mesh, split.on_shard(operation), result_shardings, operand_shardings

    def infer_sharding_from_operands(mesh, operands, results):
        return settle(mesh, *operands)[2]

    call = custom_partitioning(operation.local)
    call.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer_sharding_from_operands,  # GSPMD
        sharding_rule=_sharding_rule(operation, extents),  # Shardy
    )
    return call(*operands)


def _sharding_rule(operation: _Operation, extents: Mapping[str, int]) -> str:
    """For Shardy: dimensions with the same letter are sharded alike.

    Query and key/value heads are independent, unless they are the same, because a mesh axis may
    split the ones and not the others; `_Split` reconciles them.
    """
    same = str.maketrans("k", "h") if extents["h"] == extents["k"] else {}

    def sides(all_dims):
        return ", ".join(" ".join(dims.translate(same)) for dims in all_dims)

    return f"{sides(operation.operands)} -> {sides(operation.results)}"


def _decode(
    sharding: Sharding, shape: tuple[int, ...], mesh: Mapping[str, int]
) -> tuple[Axes, ...]:
    """The mesh axes of every dimension, from what the partitioner hands to a callback."""
    if isinstance(sharding, NamedSharding):
        return _spec(sharding, len(shape))
    free = tuple(mesh)
    decoded = []
    for whole, part in zip(shape, sharding.shard_shape(shape), strict=True):
        runs = (free[i:j] for i in range(len(free)) for j in range(i + 1, len(free) + 1))
        parts = whole // part if part else 1
        names = next((run for run in runs if math.prod(map(mesh.get, run)) == parts > 1), ())
        free = tuple(name for name in free if name not in names)
        decoded.append(names)
    return tuple(decoded)


def _spec(sharding: NamedSharding, ndim: int) -> tuple[Axes, ...]:
    """The mesh axes of every dimension."""
    entries = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    return tuple(
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for entry in entries
    )


def _mesh(operands: Sequence[jax.Array]) -> AbstractMesh:
    """The mesh that the operands' types carry; all carry the same, or none."""
    meshes = [jax.typeof(x).sharding.mesh for x in operands]
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def _explicit_axes(operands: Sequence[jax.Array]) -> Axes:
    mesh = _mesh(operands)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def _index_and_dense_dims(index: Index, dense: Dense) -> tuple[str, ...]:
    """The dimensions of the arrays that are present, a dot for each that broadcasts."""
    scores = "bhst"
    return (
        *(INDEX for x in index if x is not None),
        *(
            "".join(d if n > 1 else "." for d, n in zip(scores, x.shape, strict=True))
            for x in dense
            if x is not None
        ),
    )


def _typed_like(gradient: jax.Array, operand: jax.Array) -> jax.Array:
    """The gradient with its operand's explicit sharding, as custom_vjp demands."""
    if not _explicit_axes((operand,)):
        return gradient
    return jax.sharding.reshard(gradient, jax.typeof(operand).sharding)
