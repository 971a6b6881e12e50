"""Where things stand in a table of visibility, int32 [batch | 1, heads | 1, words].

One plane for each (batch, head), in parts that begin at multiples of 4 words:

    plane         flags, rows_end, keys_end, 0
    rows          (begin, end) of the keys that each row sees
    row_bounds    (least_begin, greatest_begin, least_end, greatest_end) of each GROUP of rows
    key_bounds    the same of the rows that see each GROUP of keys
    keys          (begin, end) of the rows that see each key

visibility/table.py has the meaning of every word, src/attention the kernels that read them.
"""

from __future__ import annotations

from typing import NamedTuple

from jax_fa3.options import MAX_SEQLEN

GROUP = 64  # rows or keys that share bounds
NONE = MAX_SEQLEN  # the begin of what sees nothing
VALID, MONOTONE = 1, 2  # flags

PLANE = 4  # words of each part's entries
INTERVAL = 2
BOUNDS = 4

# Of the kernel's workspace, as src/kernels/visibility/visibility.h has them.
CHUNK = 1024  # rows, at least
MOST_CHUNKS = 1024  # of a plane
SUMMARY_BYTES = 64  # of a chunk


class Layout(NamedTuple):
    """The first word of each part behind the plane's own, and the number of words in all."""

    rows: int
    row_bounds: int
    key_bounds: int
    keys: int
    words: int

    @classmethod
    def of(cls, seqlen_q: int, seqlen_k: int) -> Layout:
        rows = PLANE
        row_bounds = rows + whole(INTERVAL * seqlen_q)
        key_bounds = row_bounds + BOUNDS * groups(seqlen_q)
        keys = key_bounds + BOUNDS * groups(seqlen_k)
        return cls(rows, row_bounds, key_bounds, keys, keys + whole(INTERVAL * seqlen_k))


def groups(seqlen: int) -> int:
    return -(-seqlen // GROUP)


def whole(words: int) -> int:
    """Words of a part, with the zeros that fill it up."""
    return -(-words // 4) * 4


def workspace_bytes(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> int:
    """Of the kernel that makes a table: a summary of each chunk of a plane."""
    seqlen, chunk = max(seqlen_q, seqlen_k), CHUNK
    while -(-seqlen // chunk) > MOST_CHUNKS:
        chunk *= 2
    return batch * heads * -(-seqlen // chunk) * SUMMARY_BYTES
