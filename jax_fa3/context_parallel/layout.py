"""Which rows of the global sequence a device holds, and how they are exchanged.

Everything that differs between devices is a table with one entry per device, of Python integers:
what is the same on all of them can then be told, and stays static. `Axis.pick` reads a table at
this device.

Causal attention is balanced when a device holds, of 2N chunks, one from each end:

    device         0     1     2     3            chunks 0..7 of the sequence, N = 4
    contiguous   0 1   2 3   4 5   6 7            or "halves", where they are worked on apart
    zigzag       0 7   1 6   2 5   3 4
    mirrored     0 7   2 5   3 4   1 6            what `mirror` makes of contiguous

Documents make the work of any such chunk uneven. Stripes of STRIPE rows, dealt round, give each
device some of every document that is long.
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
from jax_fa3.operands import Bundle, Operands, Row
from jax_fa3.operations import LocalOperations
from jax_fa3.options import AttentionOptions

Layout = Literal["contiguous", "zigzag", "striped"]
Order = Literal["contiguous", "halves", "zigzag", "mirrored"]

STRIPE = 256  # rows: two tiles of every kernel, so that a tile's rows are neighbours


def zigzag_permute(x: jax.Array, axis: int, num_devices: int) -> jax.Array:
    """Permutes a whole sequence from natural order to the order of layout "zigzag".

    Args:
      x: an array of any dtype.
      axis: the dimension of the sequence; its extent is a multiple of 2 * num_devices.
      num_devices: N; part r of N equal parts of the result has chunks r and 2N - 1 - r of 2N equal
        chunks of x.

    Returns:
      The permuted array, of x's shape and dtype.

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


def striped_permute(x: jax.Array, axis: int, num_devices: int) -> jax.Array:
    """Permutes a whole sequence from natural order to the order of layout "striped".

    Args:
      x: an array of any dtype.
      axis: the dimension of the sequence; its extent is a multiple of 256 * num_devices.
      num_devices: N; part r of N equal parts of the result has the stripes r, r + N, r + 2N ... of
        256 rows of x.

    Returns:
      The permuted array, of x's shape and dtype.

    Raises:
      ValueError: the extent is not a multiple of 256 * num_devices.

    Example:
      >>> jax_fa3.striped_permute(jnp.arange(1024), 0, 2)[::256]
      Array([  0, 512, 256, 768], dtype=int32)
    """
    axis %= x.ndim
    return _dealt(x, axis, num_devices, "striped_permute", stripes_first=True)


def striped_unpermute(x: jax.Array, axis: int, num_devices: int) -> jax.Array:
    """The inverse of `striped_permute`, with the same arguments."""
    axis %= x.ndim
    return _dealt(x, axis, num_devices, "striped_unpermute", stripes_first=False)


def _dealt(x, axis, num_devices, function, stripes_first):
    """x with the two dimensions that its stripes make of `axis` in the other order: (stripes of a
    device, devices) in natural order, (devices, stripes of a device) in the layout's."""
    extent = x.shape[axis]
    if extent % (STRIPE * num_devices):
        raise ValueError(
            f"{function}: dimension {axis} of x has extent {extent}; expected a multiple of "
            f"{STRIPE} * num_devices = {STRIPE * num_devices}"
        )
    held = extent // (STRIPE * num_devices)
    dims = (held, num_devices) if stripes_first else (num_devices, held)
    stripes = x.reshape(*x.shape[:axis], *dims, STRIPE, *x.shape[axis + 1 :])
    return stripes.swapaxes(axis, axis + 1).reshape(x.shape)


_PERMUTES: dict[str, tuple[Callable, Callable]] = {
    "zigzag": (zigzag_permute, zigzag_unpermute),
    "striped": (striped_permute, striped_unpermute),
}


def in_layout(x: jax.Array, dim: int, size: int, layout: Layout) -> jax.Array:
    """A whole sequence in natural order, in the order in which devices hold it."""
    return _PERMUTES[layout][0](x, dim, size) if layout in _PERMUTES else x


def in_order(x: jax.Array, dim: int, size: int, layout: Layout) -> jax.Array:
    """The inverse of `in_layout`."""
    return _PERMUTES[layout][1](x, dim, size) if layout in _PERMUTES else x


def whole(x: jax.Array, dim: int, axis_name: str | tuple[str, ...], layout: Layout) -> jax.Array:
    """Every device's rows of x, gathered in natural order."""
    if x.shape[dim] == 0:  # which XLA refuses
        return x
    gathered = lax.all_gather(x, axis_name, axis=dim, tiled=True)
    return in_order(gathered, dim, lax.axis_size(axis_name), layout)


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
    if order == "halves":
        return np.stack([2 * rank, 2 * rank + 1])
    low = rank if order == "zigzag" else np.minimum(2 * rank, 2 * size - 1 - 2 * rank)
    return np.stack([low, 2 * size - 1 - low])


def stripe_table(seqlen: int, size: int) -> np.ndarray:
    """[stripe, device]: the global numbers of the stripes of each device's `seqlen` rows."""
    return np.arange(seqlen // STRIPE * size).reshape(-1, size)


def balanced(
    layout: Layout, options: AttentionOptions, operands: Operands, size: int, *seqlens: int
) -> Order:
    """The order in which to work: mirrored where contiguous rows would see unequal numbers of keys.

    A device's rows must come in halves. What a table lets rows see is hardly more equal when it is
    mirrored, and then nothing is traded.
    """
    uneven = layout == "contiguous" and mask.is_triangular(options) and size > 1
    if uneven and operands.visibility is None and not any(n % 2 for n in seqlens):
        return "mirrored"
    return "zigzag" if layout == "zigzag" else "contiguous"


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
        """int32: this device's entries of a table, which has the devices in its last dimension."""
        return jnp.asarray(table, jnp.int32)[..., self.rank]

    def shift(self, x: Any, distance: int) -> Any:
        """x of the device `distance` before this one, around the ring."""
        pairs = [(rank, (rank + distance) % self.size) for rank in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.name, pairs), x)

    def mirror(self, x: jax.Array, dim: int) -> jax.Array:
        """Contiguous rows to mirrored ones: the second half is traded with device N - 1 - rank.

        The half that stands earlier in the sequence comes first; in the lower half of the ring
        that is the one that stayed.
        """
        own, given = jnp.split(x, 2, dim)
        got = self.reflect(given)
        return jnp.concatenate([self._first(own, got), self._first(got, own)], dim)

    def unmirror(self, x: jax.Array, dim: int) -> jax.Array:
        """The inverse of `mirror`."""
        low, high = jnp.split(x, 2, dim)
        own, given = self._first(low, high), self._first(high, low)
        return jnp.concatenate([own, self.reflect(given)], dim)

    def reflect(self, x: Any) -> Any:
        """x of device N - 1 - rank."""
        pairs = [(rank, self.size - 1 - rank) for rank in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.name, pairs), x)

    def _first(self, x, y):
        return jnp.where(2 * self.rank < self.size, x, y)


def pack(*arrays: jax.Array) -> jax.Array:
    """Arrays that travel as one, whose shapes differ in the last dimension at most. A new leading
    axis keeps each of them dense and its dimensions as they were sharded; unequal arrays share
    their last dimension, those of unequal dtypes as 16-bit words.
    """
    if len({(x.shape, x.dtype) for x in arrays}) == 1:
        return jnp.stack(arrays)
    if _are_mixed(arrays):
        arrays = map(_words, arrays)
    return jnp.concatenate(tuple(arrays), axis=-1)


def unpack(packed: jax.Array, *like: jax.Array) -> list[jax.Array]:
    """The arrays of `pack`, which had the shapes and dtypes of `like`."""
    if packed.ndim > like[0].ndim:
        return [packed[i] for i in range(len(like))]
    in_words = _are_mixed(like)
    widths = [x.shape[-1] * (x.dtype.itemsize // 2 if in_words else 1) for x in like]
    parts = jnp.split(packed, np.cumsum(widths)[:-1], axis=-1)
    if not in_words:
        return parts
    return [_from_words(part, x) for part, x in zip(parts, like, strict=True)]


def _are_mixed(arrays) -> bool:
    return len({x.dtype for x in arrays}) > 1


def _words(x):
    words = lax.bitcast_convert_type(x, jnp.uint16)
    return words.reshape(*x.shape[:-1], x.shape[-1] * x.dtype.itemsize // 2)


def _from_words(words, like):
    count = like.dtype.itemsize // 2
    if count > 1:
        words = words.reshape(*like.shape, count)
    return lax.bitcast_convert_type(words, like.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """The arrays of some bundles, those of equal batch, rows and heads as one. jax.tree.map over it
    exchanges them: arrays have their rows in dimension -3, before heads and width.
    """

    arrays: tuple[jax.Array, ...]
    groups: tuple = dataclasses.field(metadata=dict(static=True))  # for each: (bundle, name), ...
    like: tuple = dataclasses.field(metadata=dict(static=True))  # the bundles, of types by row

    @classmethod
    def of(cls, *bundles: Bundle) -> Packed:
        bundles = tuple(bundle.map(by_row) for bundle in bundles)
        groups = defaultdict(list)
        for i, bundle in enumerate(bundles):
            for name, x in bundle.present().items():
                groups[x.shape[:-1]].append((i, name))
        groups = tuple(map(tuple, groups.values()))
        arrays = (pack(*(getattr(bundles[i], name) for i, name in group)) for group in groups)
        return cls(tuple(arrays), groups, jax.tree.map(jax.typeof, bundles))

    def unpacked(self) -> tuple[Bundle, ...]:
        found = [{} for _ in self.like]
        for group, packed in zip(self.groups, self.arrays, strict=True):
            like = [getattr(self.like[i], name) for i, name in group]
            for (i, name), x in zip(group, unpack(packed, *like), strict=True):
                found[i][name] = x
        pairs = zip(self.like, found, strict=True)
        return tuple(type(bundle)(**arrays).map(from_row) for bundle, arrays in pairs)


def by_row(row: Row, x: jax.Array) -> jax.Array:
    """[batch, rows, heads, width] of an array of rows, which may have heads before its rows, or
    none of the last two."""
    heads = row.axis("hk")
    if heads is None:
        x = x[:, :, None]
    elif heads < row.axis("st"):
        x = x.swapaxes(1, 2)
    return x if row.axis("de") else x[..., None]


def from_row(row: Row, x: jax.Array) -> jax.Array:
    """The array of which `by_row` made x."""
    x = x if row.axis("de") else x[..., 0]
    heads = row.axis("hk")
    if heads is None:
        return x[:, :, 0]
    return x.swapaxes(1, 2) if heads < row.axis("st") else x


class Part(NamedTuple):
    """A device's place in a divided sequence, and the operations that do its pieces of the work."""

    local: LocalOperations
    axis: Axis
    layout: Layout
