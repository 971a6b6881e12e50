"""A model of the table of a dense mask, by the words of src/attention/dense_mask.h: made of a mask,
and taken apart again."""

import numpy as np

from jax_fa3.options import dense_mask_words

ROWS, KEYS = 64, 16  # of a block that has a class
PADDING = 8


def table(mask):
    """int32 [..., words] of a bool array [..., rows, keys]."""
    mask = np.asarray(mask, bool)
    *planes, rows, keys = mask.shape
    columns = np.repeat(mask, 32, axis=-2) if rows == 1 else mask  # of all rows the same
    parts = _classes(mask), _packed(mask), _packed(np.swapaxes(columns, -1, -2))
    lines = [part.reshape(*planes, -1) for part in parts]
    words = np.concatenate([*lines, np.zeros((*planes, PADDING), np.uint32)], axis=-1)
    assert words.shape[-1] == dense_mask_words(rows, keys)
    return words.view(np.int32)


def mask_of(table, rows, keys):
    """The mask that the bits of a table say, and the one that its columns do."""
    words = np.asarray(table).view(np.uint32)
    planes = words.shape[:-1]
    begin = -(-rows // ROWS) * (-(-keys // (16 * KEYS)) + 1)
    middle = begin + rows * -(-keys // 32)
    bits = words[..., begin:middle].reshape(*planes, rows, -1)
    columns = words[..., middle:-PADDING].reshape(*planes, keys, -1)
    return _unpacked(bits, keys), np.swapaxes(_unpacked(columns, rows), -1, -2)


def _packed(lines):
    """A word for each 32 of the last axis, the first the lowest bit; what is missing is 0."""
    missing = [(0, 0)] * (lines.ndim - 1) + [(0, -lines.shape[-1] % 32)]
    bits = np.pad(lines, missing)
    packed = np.packbits(bits, axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u4")


def _unpacked(words, count):
    bytes_ = np.ascontiguousarray(words).view(np.uint8)
    return np.unpackbits(bytes_, axis=-1, count=count, bitorder="little").astype(bool)


def _classes(mask):
    """Of blocks of ROWS and KEYS two bits: whether any pair is seen, and whether all are."""
    any_seen = _blocks(mask, False).any(axis=(-3, -1))
    all_seen = _blocks(mask, True).all(axis=(-3, -1))
    two = np.stack([any_seen, all_seen], axis=-1)
    return _packed(two.reshape(*two.shape[:-2], 2 * two.shape[-2]))


def _blocks(mask, missing):
    """[..., groups, ROWS, blocks, KEYS]: whole words of blocks, and a word more."""
    *planes, rows, keys = mask.shape
    groups, words = -(-rows // ROWS), -(-keys // (16 * KEYS)) + 1
    whole = np.full((*planes, groups * ROWS, words * 16 * KEYS), missing)
    whole[..., :rows, :keys] = mask
    return whole.reshape(*planes, groups, ROWS, 16 * words, KEYS)
