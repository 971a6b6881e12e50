"""The table of a dense mask that the kernel makes: word by word the model's."""

import jax
import numpy as np
import pytest
from kernels import spoil_free_memory

import dense_mask
from jax_fa3 import ffi

SHAPES = (
    (1, 1, 4096, 4096),
    (4, 1, 2048, 1024),
    (384, 1, 1, 384),
    (2, 1, 1, 70_001),
    (1, 1, 70_001, 1),
    (1, 1, 1, 1),
    (2, 3, 1000, 777),  # rows that begin at any place of a packet
    (3, 5, 129, 257),
    (7, 3, 129, 3),
    (2, 2, 513, 8),
    (1, 2, 300, 4100),
    (1, 1, 200, 2**18 + 5),
    (1, 1, 2**18 + 5, 40),
)
RANDOM = np.random.default_rng(0).integers(1, (4, 4, 600, 1200), (40, 4)).tolist()


def made(mask):
    """The kernel's table, in memory that was spoilt."""
    executable = jax.jit(ffi.dense_mask).lower(mask).compile()
    assert "jax_fa3_dense_mask" in executable.as_text()
    spoil_free_memory([executable.out_info.size * 4])
    return np.asarray(executable(mask))


def check(mask):
    np.testing.assert_array_equal(made(mask), dense_mask.table(mask))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept", (0.5, 0.999, 0.001))
def test_random_masks(shape, kept):
    check(np.random.default_rng(1).random(shape, np.float32) < kept)


@pytest.mark.parametrize("shape", RANDOM, ids=str)
def test_random_shapes(shape):
    random = np.random.default_rng(shape)
    check(random.random(shape, np.float32) < random.random())


@pytest.mark.parametrize("shape", ((2, 1, 1000, 1024), (1, 2, 500, 333)))
def test_blocks_that_are_seen_as_a_whole_or_not_at_all(shape):
    rows, keys = np.ogrid[: shape[-2], : shape[-1]]
    for mask in (keys <= rows, rows // 100 == keys // 100, keys < 65, rows >= 0):
        check(np.broadcast_to(mask, shape).copy())


@pytest.mark.parametrize("shape", ((2, 3, 0, 5), (2, 3, 5, 0)))
def test_without_rows_or_keys(shape):
    check(np.zeros(shape, bool))
