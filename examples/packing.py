"""Documents of different lengths in rows of one length, and back."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Packed(NamedTuple):
    """int32 [rows, length] both; segment ids count a row's documents from 1, padding has 0."""

    tokens: np.ndarray
    segment_ids: np.ndarray

    def documents(self) -> list[np.ndarray]:
        """The documents, row by row."""
        return [
            tokens[ids == i]
            for tokens, ids in zip(*self, strict=True)
            for i in range(1, ids.max() + 1)
        ]

    @property
    def count(self) -> int:
        """How many tokens are no padding."""
        return int((self.segment_ids > 0).sum())


def pack(documents: Iterable[np.ndarray], length: int) -> Packed:
    """Each document into the first row with room for it; padding comes last in a row.

    One that is longer than a row becomes several.
    """
    rows: list[list[np.ndarray]] = []
    room: list[int] = []
    for document in documents:
        for start in range(0, len(document), length):
            piece = document[start : start + length]
            fits = (row for row, free in enumerate(room) if free >= len(piece))
            row = next(fits, len(rows))
            if row == len(rows):
                rows.append([])
                room.append(length)
            rows[row].append(piece)
            room[row] -= len(piece)
    return _fill(rows, length)


def pad(documents: Iterable[np.ndarray]) -> Packed:
    """Each document in a row of its own, as long as the longest."""
    rows = [[document] for document in documents]
    return _fill(rows, max(len(document) for (document,) in rows))


def _fill(rows: list[list[np.ndarray]], length: int) -> Packed:
    packed = Packed(*np.zeros((2, len(rows), length), np.int32))
    for tokens, ids, documents in zip(*packed, rows, strict=True):
        lengths = list(map(len, documents))
        tokens[: sum(lengths)] = np.concatenate(documents)
        ids[: sum(lengths)] = np.repeat(np.arange(1, len(documents) + 1), lengths)
    return packed


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """int32 [batch, seqlen]: where a token stands in its document, from 0."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    starts = jnp.diff(segment_ids, prepend=-1) != 0  # no id is -1
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
