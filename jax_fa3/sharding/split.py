"""Which mesh axes split which dimension of a call, and what one device does with its part."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jax_fa3.sharding.meshes import Axes
from jax_fa3.sharding.operation import Operation, Results


@dataclasses.dataclass(frozen=True)
class Split:
    """Which mesh axes split each dimension of a call; dimensions left out are whole."""

    mesh: Mapping[str, int]  # axis name -> size
    extents: Mapping[str, int]  # dimension -> extent before the split
    axes: dict[str, Axes] = dataclasses.field(default_factory=dict)

    @classmethod
    def settle(
        cls,
        operation: Operation,
        mesh: Mapping[str, int],
        extents: Mapping[str, int],
        offers: Sequence[tuple[str, tuple[Axes, ...]]],
        *,
        communicates: bool = True,
    ) -> Split:
        """The split that `offers` ask for: the dimensions of some arrays, and the axes of each.

        A dimension is split as finely as any array has it; arrays that were split less follow
        without communication. Batch goes before heads, and heads before the sequence, where they
        ask for the same axis. Without `communicates`, nothing is split that needs a collective.
        """
        split = cls(mesh, extents)
        split._check_whole(operation.whole, offers)
        for letter in operation.batch:
            split.axes[letter] = split._finest(letter, letter, offers)
        if "h" in extents:
            split.axes["h"] = split._finest("h", "hk", offers)
        if "k" in extents:
            asked = split.axes["h"] if "h" in extents else split._finest("k", "k", offers)
            split.axes["k"] = split._dividing("k", asked)
            if "h" in extents and (operation.heads_alike or not communicates):
                split.axes["h"] = split.axes["k"]
        if extents.keys() >= set("st"):
            sequence = split._finest("s", "s", offers)
            if sequence and _keeps_sequence_split(operation, split, sequence, communicates):
                split.axes["s"] = split.axes["t"] = sequence
        return split

    def spec(self, dims: str) -> PartitionSpec:
        return PartitionSpec(*(self.axes.get(letter) or None for letter in dims))

    def on_shard(self, operation: Operation) -> Callable[..., Results]:
        """The operation on one device's part of every operand."""

        def body(*operands):
            if not operation.heads_meet:
                return operation.local(self.axes.get("s", ()), *operands)
            operands = map(self._select_heads, operands, operation.operands)
            results = operation.local(self.axes.get("s", ()), *operands)
            if not operation.are_shares:
                return results
            return tuple(map(self._sum, results, operation.results))

        return body

    def parts(self, axes: Axes) -> int:
        return math.prod(self.mesh[name] for name in axes)

    def _check_whole(self, whole: Mapping[str, str], offers) -> None:
        """Raises where a dimension arrives split that must not."""
        for dims, dims_axes in offers:
            for letter, axes in zip(dims, dims_axes, strict=True):
                if letter in whole and self.parts(axes) > 1:
                    raise ValueError(whole[letter].format(axes=", ".join(map(repr, axes))))

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
    operation: Operation, split: Split, sequence: Axes, communicates: bool
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
            "the call is inside a jax.shard_map that leaves this axis automatic; make the axis "
            "manual there and use the functions of docs/context_parallel.md"
        )
    elif operation.needs_whole:
        obstacle = f"the call has {operation.needs_whole}, which need whole sequences"
    if obstacle and wish != "auto":
        raise ValueError(f"{over}, and sequence_parallel is {wish!r}, but {obstacle}")
    return obstacle is None
