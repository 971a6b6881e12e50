"""Which rows of the global sequence a device holds, and how they are exchanged.

Everything that differs between devices is a table with one entry per device, of Python integers:
what is the same on all of them can then be told, and stays static. `Axis.pick` reads a table at
this device.

Causal attention is balanced when a device holds, of 2N chunks, one from each end:

    device         0     1     2     3            chunks 0..7 of the sequence, N = 4
    contiguous   0 1   2 3   4 5   6 7
    zigzag       0 7   1 6   2 5   3 4
    mirrored     0 7   2 5   3 4   1 6            what `mirror` makes of contiguous
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fa3 import mask
from jax_fa3.operands import Bundle
from jax_fa3.operations import Operations
from jax_fa3.options import AttentionOptions

Layout = Literal["contiguous", "zigzag"]
Order = Literal["contiguous", "zigzag", "mirrored"]


def zigzag_permute(x: jax.Array, axis: int, num_devices: int) -> jax.Array:
    """A whole sequence in natural order, brought into the order of layout "zigzag".

    Args:
      x: an array of any dtype.
      axis: the sequence's dimension, of an extent that 2 * num_devices divides.
      num_devices: N; dividing the result into N equal parts gives part r the chunks r and
        2N - 1 - r of the 2N equal chunks of x.

    Raises:
      ValueError: the extent is not a multiple of 2 * num_devices.

    Example:
      >>> jax_fa3.zigzag_permute(jnp.arange(8), 0, 2)
      Array([0, 1, 6, 7, 2, 3, 4, 5], dtype=int32)
    """
    axis %= x.ndim
    chunks = _cut(x, axis, num_devices, "zigzag_permute")
    first, last = jnp.split(chunks, 2, axis)
    pairs = jnp.stack([first, jnp.flip(last, axis)], axis + 1)
    return pairs.reshape(x.shape)


def zigzag_unpermute(x: jax.Array, axis: int, num_devices: int) -> jax.Array:
    """The inverse of `zigzag_permute`, with the same arguments."""
    axis %= x.ndim
    chunks = _cut(x, axis, num_devices, "zigzag_unpermute")
    pairs = chunks.reshape(*x.shape[:axis], num_devices, 2, *chunks.shape[axis + 1 :])
    first, last = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    return jnp.concatenate([first, jnp.flip(last, axis)], axis).reshape(x.shape)


def _cut(x, axis, num_devices, function):
    """x with dimension `axis` cut into 2 * num_devices chunks and their rows."""
    extent = x.shape[axis]
    if extent % (2 * num_devices):
        raise ValueError(
            f"{function}: dimension {axis} of x has extent {extent}; expected a multiple of "
            f"2 * num_devices = {2 * num_devices}"
        )
    rows = extent // (2 * num_devices)
    return x.reshape(*x.shape[:axis], 2 * num_devices, rows, *x.shape[axis + 1 :])


def chunk_table(order: Order, size: int) -> np.ndarray:
    """[chunk, device]: the global numbers of each device's chunks, in the order it holds them."""
    rank = np.arange(size)
    if order == "contiguous":
        return rank[None]
    low = rank if order == "zigzag" else np.minimum(2 * rank, 2 * size - 1 - 2 * rank)
    return np.stack([low, 2 * size - 1 - low])


def balanced(layout: Layout, options: AttentionOptions, size: int, *seqlens: int) -> Order:
    """The order in which to work: mirrored where contiguous rows would see unequal numbers of keys.

    A device's rows must come in halves.
    """
    uneven = layout == "contiguous" and mask.is_triangular(options) and size > 1
    return "mirrored" if uneven and not any(n % 2 for n in seqlens) else layout


@dataclasses.dataclass(frozen=True)
class Axis:
    """A bound mesh axis, or several as one: `size` devices, of which this is number `rank`."""

    name: str | tuple[str, ...]
    size: int
    rank: jax.Array

    @classmethod
    def bound(cls, name: str | tuple[str, ...]) -> Axis:
        return cls(name, lax.axis_size(name), lax.axis_index(name))

    def pick(self, table: np.ndarray) -> jax.Array:
        """int32 []: this device's entry of a table with one entry per device."""
        return jnp.asarray(table, jnp.int32)[self.rank]

    def shift(self, x: jax.Array, distance: int) -> jax.Array:
        """x of the device `distance` before this one, around the ring."""
        pairs = [(rank, (rank + distance) % self.size) for rank in range(self.size)]
        return lax.ppermute(x, self.name, pairs)

    def mirror(self, x: jax.Array, dim: int) -> jax.Array:
        """Contiguous rows to mirrored ones: the second half is traded with device N - 1 - rank.

        The half that stands earlier in the sequence comes first; in the lower half of the ring
        that is the one that stayed.
        """
        own, given = jnp.split(x, 2, dim)
        got = self._reflect(given)
        return jnp.concatenate([self._first(own, got), self._first(got, own)], dim)

    def unmirror(self, x: jax.Array, dim: int) -> jax.Array:
        """The inverse of `mirror`."""
        low, high = jnp.split(x, 2, dim)
        own, given = self._first(low, high), self._first(high, low)
        return jnp.concatenate([own, self._reflect(given)], dim)

    def _reflect(self, x):
        pairs = [(rank, self.size - 1 - rank) for rank in range(self.size)]
        return lax.ppermute(x, self.name, pairs)

    def _first(self, x, y):
        return jnp.where(2 * self.rank < self.size, x, y)


def pack(*arrays: jax.Array) -> jax.Array:
    """Arrays that travel as one, whose shapes differ in the last dimension at most. A new leading
    axis keeps each of them dense and its dimensions as they were sharded; unequal arrays share
    their last dimension.
    """
    if len({x.shape for x in arrays}) == 1:
        return jnp.stack(arrays)
    return jnp.concatenate(arrays, axis=-1)


def unpack(packed: jax.Array, *like: jax.Array) -> list[jax.Array]:
    """The arrays of `pack`, which had the shapes of `like`."""
    if packed.ndim > like[0].ndim:
        return [packed[i] for i in range(len(like))]
    return jnp.split(packed, np.cumsum([x.shape[-1] for x in like])[:-1], axis=-1)


@dataclasses.dataclass(frozen=True)
class Packed:
    """The arrays of some bundles, those that differ in no more than their last dimension as one."""

    bundles: tuple[Bundle, ...]
    groups: dict[tuple, list[tuple[int, str]]]  # by dimensions and dtype: bundle and name
    arrays: dict[tuple, jax.Array]

    @classmethod
    def of(cls, *bundles: Bundle) -> Packed:
        groups = defaultdict(list)
        for i, bundle in enumerate(bundles):
            for (name, x), dims in zip(bundle.present().items(), bundle.dims(), strict=True):
                groups[dims.rstrip("de"), len(dims), x.dtype].append((i, name))
        arrays = {
            kind: pack(*(getattr(bundles[i], name) for i, name in group))
            for kind, group in groups.items()
        }
        return cls(bundles, groups, arrays)

    def each(self, function: Callable[[jax.Array], jax.Array]) -> Packed:
        arrays = {kind: function(x) for kind, x in self.arrays.items()}
        return dataclasses.replace(self, arrays=arrays)

    def along(self, function: Callable[[jax.Array, int], jax.Array]) -> Packed:
        """function(array, dimension of its sequence, from the end)."""

        def dim(dims, ndim, _):
            return next(dims.index(letter) for letter in "st" if letter in dims) - ndim

        arrays = {kind: function(x, dim(*kind)) for kind, x in self.arrays.items()}
        return dataclasses.replace(self, arrays=arrays)

    def unpacked(self) -> tuple[Bundle, ...]:
        found = [{} for _ in self.bundles]
        for kind, group in self.groups.items():
            like = [getattr(self.bundles[i], name) for i, name in group]
            for (i, name), x in zip(group, unpack(self.arrays[kind], *like), strict=True):
                found[i][name] = x
        return tuple(type(x)(**arrays) for x, arrays in zip(self.bundles, found, strict=True))


class Part(NamedTuple):
    """A device's place in a divided sequence, and the operations that do its pieces of the work."""

    local: Operations
    axis: Axis
    layout: Layout


def vary_together(operands: Any) -> Any:
    """The operands, all varying over the union of their varying manual axes."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(operands)]
    union = frozenset().union(*varying)

    def cast(x):
        missing = tuple(sorted(union - jax.typeof(x).manual_axis_type.varying))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, operands)
