"""The model of a mask's table: what is known of some, and that it says what the mask does."""

import numpy as np
import pytest

import dense_mask


@pytest.mark.parametrize("rows", (1, 32, 65, 200))
@pytest.mark.parametrize("keys", (1, 32, 257, 300))
def test_bits_and_columns_are_the_mask(rows, keys):
    mask = np.random.default_rng(rows * keys).random((2, 3, rows, keys)) < 0.5
    table = dense_mask.table(mask)
    assert table.dtype == np.int32 and not table[..., -dense_mask.PADDING :].any()
    for said in dense_mask.mask_of(table, rows, keys):
        np.testing.assert_array_equal(said, mask)


def test_classes():
    """One pair of the first group's second block; of the third block all that is there."""
    mask = np.zeros((1, 1, 70, 36), bool)
    mask[0, 0, 63, 31] = True
    mask[..., 32:] = True
    words = dense_mask.table(mask).view(np.uint32)[0, 0]
    not_there = 0xAAAAAAAA
    first = not_there & ~0b111111 | 0b110100
    second = not_there & ~0b111111 | 0b110000
    assert list(words[:4]) == [first, not_there, second, not_there]


def test_columns_of_one_row_serve_all_rows():
    mask = np.asarray([[[[True, False, True]]]])
    words = dense_mask.table(mask).view(np.uint32)[0, 0]
    assert list(words) == [0xAAAAAAA9, 0xAAAAAAAA, 0b101, 0xFFFFFFFF, 0, 0xFFFFFFFF] + [0] * 8
