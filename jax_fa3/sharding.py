"""How one call meets a mesh: the operations of calls.py and context.py on each device's part.

All operations, forward and backward, go the same way, each by itself: which mesh axes split which
dimension is settled once (`_Split`), and then carried out

    explicit axes     by jax.shard_map over them
    automatic axes    by custom_partitioning, once XLA's partitioner has settled all shardings
    manual axes       by nobody: inside jax.shard_map and pmap the call is already local

and on a mixed mesh in that order, one inside the other. Batch and heads are split without
communication. A sequence that arrives split is left so; context.py exchanges what is needed.

Dimensions have letters: b batch, s query rows, t key rows, h query heads, k key/value heads,
d head_dim, e head_dim of value, m and n the blocks of query and key rows that share a scale, p the
keys of a prepared value; capitals are mapped axes (jax.vmap), which lead; a dot is a dimension of
extent 1 that broadcasts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, Sharding

from jax_fa3 import calls, context
from jax_fa3.context.layout import vary_together
from jax_fa3.options import AttentionOptions, Dense, Descales, Index

Axes = tuple[str, ...]
Results = tuple[jax.Array, ...]

QUERY, KEY, VALUE, OUT, LSE, INDEX, SCORES = "bshd", "btkd", "btke", "bshe", "bhs", "b", "bhst"
DESCALES, PREPARED_VALUE = ("bhm", "bkn", "bk"), "bkep"


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

    def local(sequence, *operands):
        *arrays, dense = tree.unflatten(operands)
        if sequence:
            return context.forward(
                _strategy(options, sequence, *arrays[:3]), sequence, options, *arrays
            )
        return calls.forward(options, *arrays, dense)

    dims = (QUERY, KEY, VALUE, *_dims_of(index), *_dims_of(dense))
    operation = _Operation(options, local, dims, (OUT, LSE), _needs_whole(dense))
    return _distribute(operation, operands)


def forward_float8(
    options: AttentionOptions,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    descales: Descales,
    index: Index,
    dense: Dense,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """`forward` of float8 arrays, with an output of `dtype`."""
    operands, tree = jax.tree.flatten((query, key, value, descales, index, dense))

    def local(sequence, *operands):
        return calls.forward_float8(options, *tree.unflatten(operands), dtype)

    value_dims = PREPARED_VALUE if options.value_is_prepared else VALUE
    dims = (QUERY, KEY, value_dims, *DESCALES, *_dims_of(index), *_dims_of(dense))
    operation = _Operation(options, local, dims, (OUT, LSE), "float8 inputs need whole sequences")
    return _distribute(operation, operands)


def quantized(
    seed: int,
    prepare_value: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: Index,
) -> Results:
    """The arrays of a QuantizedQKV, with measured scales by blocks."""
    options = AttentionOptions(scale=1.0, quantized_forward=True)
    operands, tree = jax.tree.flatten((query, key, value, index))

    def local(sequence, *operands):
        return calls.quantized(options, seed, prepare_value, *tree.unflatten(operands))

    dims = (QUERY, KEY, VALUE, *_dims_of(index))
    results = (QUERY, KEY, PREPARED_VALUE if prepare_value else VALUE, *DESCALES)
    operation = _Operation(options, local, dims, results, "a scale is for whole blocks", False)
    return _distribute(operation, operands)


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

    def local(sequence, *operands):
        *arrays, dense = tree.unflatten(operands)
        if sequence:
            return context.backward(
                _strategy(options, sequence, *arrays[:3]), sequence, options, *arrays
            )
        return calls.backward(options, *arrays, dense)[: len(differentiable)]

    cotangents = (OUT,) if dlse is None else (OUT, LSE)
    dims = (QUERY, KEY, VALUE, OUT, LSE, *cotangents, *_dims_of(index), *_dims_of(dense))
    results = (QUERY, KEY, VALUE, *_dims_of(dense._replace(mask=None)))
    operation = _Operation(options, local, dims, results, _needs_whole(dense))
    gradients = _distribute(operation, operands)
    return (*map(typed_like, gradients, differentiable), None)[:4]


@dataclasses.dataclass(frozen=True)
class _Operation:
    """A forward or backward operation, with the dimensions of its operands and results.

    local(sequence, *operands) is what one device does; `sequence` has the bound mesh axes over
    which query and key rows are split, none where it has all of them.
    """

    options: AttentionOptions
    local: Callable[..., Results]
    operands: tuple[str, ...]
    results: tuple[str, ...]
    needs_whole: str | None  # why sequences cannot stay split, where they cannot
    heads_meet: bool = True  # query heads those of key and value; else each goes its own way

    def mapped(self) -> _Operation:
        """The operation with one more leading axis."""
        letter = string.ascii_uppercase[len(self.operands[0]) - len(QUERY)]

        def local(sequence, *operands):
            return jax.vmap(functools.partial(self.local, sequence))(*operands)

        return dataclasses.replace(
            self,
            local=local,
            operands=tuple(letter + dims for dims in self.operands),
            results=tuple(letter + dims for dims in self.results),
        )

    def extents(self, operands: Sequence[jax.Array]) -> dict[str, int]:
        """The extent of each dimension."""
        pairs = zip(self.operands, operands, strict=True)
        return {letter: n for dims, x in pairs for letter, n in zip(dims, x.shape, strict=True)}


@dataclasses.dataclass(frozen=True)
class _Split:
    """Which mesh axes split each dimension of a call; dimensions left out are whole."""

    mesh: Mapping[str, int]  # axis name -> size
    extents: Mapping[str, int]  # dimension -> extent before the split
    axes: dict[str, Axes] = dataclasses.field(default_factory=dict)

    @classmethod
    def settle(
        cls,
        operation: _Operation,
        mesh: Mapping[str, int],
        extents: Mapping[str, int],
        offers: Sequence[tuple[str, tuple[Axes, ...]]],
        *,
        communicates: bool = True,
    ) -> _Split:
        """The split that `offers` ask for: the dimensions of some arrays, and the axes of each.

        A dimension is split as finely as any array has it; arrays that were split less follow
        without communication. Batch goes before heads, and heads before the sequence, where they
        ask for the same axis. Without `communicates`, nothing is split that needs a collective.
        """
        split = cls(mesh, extents)
        for letter in operation.operands[0][:-3]:
            split.axes[letter] = split._finest(letter, letter, offers)
        split.axes["h"] = split._finest("h", "hk", offers)
        split.axes["k"] = split._dividing("k", split.axes["h"])
        if not communicates:
            split.axes["h"] = split.axes["k"]
        sequence = split._finest("s", "s", offers)
        if sequence and _keeps_sequence_split(operation, split, sequence, communicates):
            split.axes["s"] = split.axes["t"] = sequence
        return split

    def spec(self, dims: str) -> PartitionSpec:
        return PartitionSpec(*(self.axes.get(letter) or None for letter in dims))

    def on_shard(self, operation: _Operation) -> Callable[..., Results]:
        """The operation on one device's part of every operand."""

        def body(*operands):
            if not operation.heads_meet:
                return operation.local(self.axes.get("s", ()), *operands)
            operands = map(self._select_heads, operands, operation.operands)
            results = operation.local(self.axes.get("s", ()), *operands)
            return tuple(map(self._sum, results, operation.results))

        return body

    def parts(self, axes: Axes) -> int:
        return math.prod(self.mesh[name] for name in axes)

    def _finest(self, letter: str, askers: str, offers) -> Axes:
        """Of the axes that `offers` have for the dimensions `askers`, those with most parts."""
        used = {name for axes in self.axes.values() for name in axes}
        asked = [
            self._dividing(letter, tuple(name for name in axes if name not in used))
            for dims, dims_axes in offers
            for dim, axes in zip(dims, dims_axes, strict=True)
            if dim in askers
        ]
        return max(asked, key=self.parts)

    def _dividing(self, letter: str, axes: Axes) -> Axes:
        """The first of `axes`, as many as divide the dimension evenly."""
        while self.extents[letter] % self.parts(axes):
            axes = axes[:-1]
        return axes

    def _key_heads(self) -> jax.Array:
        """Which of its key/value heads this device's query heads need, in order.

        Where query heads are split further than key/value heads, a device has query heads of one
        group, or the end of one group and the start of the next. The longest runs of query heads
        that share a key/value head on every device become the groups of the local call.
        """
        local_heads = self.extents["h"] // self.parts(self.axes["h"])
        group = self.extents["h"] // self.extents["k"]
        run = math.gcd(local_heads, group)
        first = lax.axis_index(self.axes["h"]) * local_heads
        heads = (first + run * jnp.arange(local_heads // run)) // group
        if self.axes["k"]:
            heads -= lax.axis_index(self.axes["k"]) * self._local_key_heads()
        return heads

    def _local_key_heads(self) -> int:
        return self.extents["k"] // self.parts(self.axes["k"])

    def _select_heads(self, x: jax.Array, dims: str) -> jax.Array:
        if "k" not in dims or self.axes["h"] == self.axes["k"]:
            return x
        return jnp.take(x, self._key_heads(), axis=dims.index("k"), mode="clip")

    def _sum(self, x: jax.Array, dims: str) -> jax.Array:
        """`x`, a share of the result on each device that has no part of it to itself, summed in
        float32; the heads that `_select_heads` took are put back where they were.
        """
        own = {name for letter in dims for name in self.axes.get(letter, ())}
        shared = {name for axes in self.axes.values() for name in axes} - own
        if not shared:
            return x
        total = x.astype(jnp.float32)
        if "k" in dims:
            heads = jnp.zeros((*x.shape[:-2], self._local_key_heads(), x.shape[-1]), jnp.float32)
            total = heads.at[..., self._key_heads(), :].add(total)
        return lax.psum(total, tuple(name for name in self.mesh if name in shared)).astype(x.dtype)


def _keeps_sequence_split(
    operation: _Operation, split: _Split, sequence: Axes, communicates: bool
) -> bool:
    """Whether rows that arrive split stay so; where not, they are gathered."""
    wish = operation.options.sequence_parallel
    over = f"query arrives with its sequence split over mesh axis {', '.join(map(repr, sequence))}"
    if wish == "error":
        raise ValueError(
            f"{over}, and sequence_parallel is 'error'; expected whole sequences: split batch or "
            "heads instead, or pass sequence_parallel='auto'"
        )
    obstacle = None
    if split.extents["t"] % split.parts(sequence):
        obstacle = (
            f"key has seq = {split.extents['t']}, which is not a multiple of its "
            f"{split.parts(sequence)} devices"
        )
    elif not communicates:
        obstacle = (
            "the call stands in a jax.shard_map that leaves this axis automatic; make it manual "
            "there and use the functions of docs/context_parallel.md"
        )
    else:
        obstacle = operation.needs_whole
    if obstacle and wish != "auto":
        raise ValueError(f"{over}, and sequence_parallel is {wish!r}, but {obstacle}")
    return obstacle is None


def _strategy(
    options: AttentionOptions, sequence: Axes, query: jax.Array, key: jax.Array, value: jax.Array
) -> context.Strategy:
    if options.sequence_parallel == "auto":
        return context.choose(options, query, key, value, lax.axis_size(sequence))
    return options.sequence_parallel


def _distribute(operation: _Operation, operands: Sequence[jax.Array]) -> Results:
    """The operation on operands that are sharded in any way."""
    explicit = _axes_of(_mesh(operands), AxisType.Explicit)
    options = operation.options
    if options.route == "xla" and options.sequence_parallel == "auto":
        # Ordinary XLA code, which XLA partitions, with derivatives of any order.
        return _over_explicit(operation, operands) if explicit else operation.local((), *operands)

    @custom_vmap
    def call(*operands):
        return (_over_explicit if explicit else _over_automatic)(operation, operands)

    @call.def_vmap
    def lead(size, mapped, *operands):
        """A mapped axis becomes a dimension of its own, which is split like any other."""
        operands = [
            x if is_mapped else jnp.broadcast_to(x[None], (size, *x.shape))
            for x, is_mapped in zip(operands, mapped, strict=True)
        ]
        return _distribute(operation.mapped(), operands), (True,) * len(operation.results)

    return calls.first_order_only(call)(*operands)


def _over_explicit(operation: _Operation, operands: Sequence[jax.Array]) -> Results:
    """jax.shard_map over the explicit axes; automatic ones are met inside of it."""
    mesh = _mesh(operands)
    offers = [
        (dims, _axes_by_dimension(jax.typeof(x).sharding, x.ndim))
        for dims, x in zip(operation.operands, operands, strict=True)
    ]
    split = _Split.settle(operation, mesh.shape, operation.extents(operands), offers)
    specs = tuple(map(split.spec, operation.operands))
    operands = [
        jax.sharding.reshard(x, NamedSharding(mesh, spec))
        for x, spec in zip(operands, specs, strict=True)
    ]

    def local(sequence, *operands):
        if sequence or operation.options.route == "xla":
            return operation.local(sequence, *operands)
        return _over_automatic(operation, operands)

    on_shard = split.on_shard(dataclasses.replace(operation, local=local))
    # No names stand for all of them but those that jax.vmap maps over, which only JAX knows.
    mixed = _axes_of(mesh, AxisType.Auto)
    return jax.shard_map(
        lambda *operands: on_shard(*vary_together(operands)),
        mesh=mesh,
        in_specs=specs,
        out_specs=tuple(map(split.spec, operation.results)),
        axis_names=set(_axes_of(mesh, AxisType.Explicit) if mixed else ()),
        # Where heads do not meet, results of key and value are equal on devices that share them,
        # which cannot be inferred from one custom call for all.
        check_vma=operation.heads_meet,
    )(*operands)


def _over_automatic(operation: _Operation, operands: Sequence[jax.Array]) -> Results:
    """custom_partitioning over the automatic axes; on one device it is the operation itself.

    In a jax.shard_map that leaves some axes automatic, the partitioner numbers the devices of
    those axes alone and tells in how many parts, not over which axes, a dimension is split. There
    a collective would address the wrong devices.
    """
    outside = jax.sharding.get_abstract_mesh()
    automatic = {name: outside.shape[name] for name in _axes_of(outside, AxisType.Auto)}
    in_shard_map = AxisType.Manual in outside.axis_types
    if in_shard_map and math.prod(automatic.values()) == 1:  # one part, which JAX refuses
        return operation.local((), *operands)
    extents = operation.extents(operands)

    def settle(mesh, arrays):
        mesh = AbstractMesh(tuple(automatic.values()), tuple(automatic)) if mesh.empty else mesh
        dims = operation.operands + operation.results
        offers = [
            (dims, _decode(x.sharding, x.shape, mesh.shape))
            for dims, x in zip(dims, arrays, strict=False)
        ]
        split = _Split.settle(operation, mesh.shape, extents, offers, communicates=not in_shard_map)

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


def _sharding_rule(operation: _Operation, extents: Mapping[str, int]) -> str:
    """Dimensions with the same letter are sharded alike.

    Query and key/value heads are dimensions of their own, unless they are equal in number: a mesh
    axis may divide the ones and not the others, which is for `_Split` to settle.
    """
    letters = str.maketrans("k", "h") if extents["h"] == extents["k"] else {}

    def side(arrays):
        return ", ".join(" ".join(dims.translate(letters)) for dims in arrays)

    return f"{side(operation.operands)} -> {side(operation.results)}"


def _decode(
    sharding: Sharding, shape: tuple[int, ...], mesh: Mapping[str, int]
) -> tuple[Axes, ...]:
    """The mesh axes of each dimension, from what the partitioner hands to a callback.

    Where that has numbers of parts only, the first free axes that make them; taking one axis for
    another of its size moves data, and is right all the same.
    """
    if isinstance(sharding, NamedSharding):
        return _axes_by_dimension(sharding, len(shape))
    free = tuple(mesh)
    found = []
    for whole, part in zip(shape, sharding.shard_shape(shape), strict=True):
        parts = whole // part if part else 1
        runs = (free[i:j] for i in range(len(free)) for j in range(i + 1, len(free) + 1))
        axes = next((run for run in runs if math.prod(map(mesh.get, run)) == parts > 1), ())
        free = tuple(name for name in free if name not in axes)
        found.append(axes)
    return tuple(found)


def _axes_by_dimension(sharding: NamedSharding, ndim: int) -> tuple[Axes, ...]:
    entries = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    return tuple(
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for entry in entries
    )


def _mesh(operands: Sequence[jax.Array]) -> AbstractMesh:
    """The mesh in the operands' types."""
    meshes = [jax.typeof(x).sharding.mesh for x in operands]
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def _axes_of(mesh: AbstractMesh, kind: AxisType) -> Axes:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, its_kind in kinds if its_kind == kind)


def _dims_of(optional: Index | Dense) -> tuple[str, ...]:
    """The dimensions of those arrays that are present."""
    present = [x for x in optional if x is not None]
    if isinstance(optional, Index):
        return (INDEX,) * len(present)
    return tuple(
        "".join(letter if n > 1 else "." for letter, n in zip(SCORES, x.shape, strict=True))
        for x in present
    )


def _needs_whole(dense: Dense) -> str | None:
    return "a bias or mask needs whole sequences" if _dims_of(dense) else None


def typed_like(derivative: jax.Array, array: jax.Array) -> jax.Array:
    """The derivative with its array's explicit sharding, as JAX demands of custom ones."""
    sharding = jax.typeof(array).sharding
    if not _axes_of(sharding.mesh, AxisType.Explicit):
        return derivative
    return jax.sharding.reshard(derivative, sharding)
