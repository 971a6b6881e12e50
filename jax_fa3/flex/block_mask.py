"""Block masks: for each block of rows and keys, whether no, some or all pairs are visible."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fa3.flex.functions import FULL, PARTIAL, over_pairs, trace
from jax_fa3.options import MAX_SEQLEN
from jax_fa3.values import as_int

# The kernels' tiles are within a block of this many rows and keys. Their table has two bits, as a
# state has, for each group of rows and block of keys (src/attention/dense_mask.h).
BLOCK_OF_KERNELS = 128
GROUP_ROWS, CLASS_KEYS, CLASSES_OF_WORD = 64, 16, 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """The result of `create_block_mask`: a pytree whose only array is `states`.

    Attributes:
      states: uint8 (B or 1, N or 1, ceil(T / rows), ceil(S / keys)), for each block of rows and
        keys: 0 if no row sees a key, 1 if some pairs are visible, 3 if every row sees every key.
        Pairs past the last row or key do not count.
      q_len, kv_len: T and S, the numbers of rows and keys.
      block_size: (rows, keys) of a block.
    """

    states: jax.Array
    q_len: int = dataclasses.field(metadata=dict(static=True))
    kv_len: int = dataclasses.field(metadata=dict(static=True))
    block_size: tuple[int, int] = dataclasses.field(metadata=dict(static=True))


def create_block_mask(
    mask_mod: Callable[..., Any],
    batch: int | None,
    num_heads: int | None,
    q_len: int,
    kv_len: int,
    captured: tuple[Any, ...] = (),
    *,
    block_size: int | tuple[int, int] = 128,
) -> BlockMask:
    """The block mask of a mask function, made once and passed to every layer as `block_mask`.

    The function is evaluated for one row of blocks at a time, so the peak memory is one row of
    blocks and the result, never all pairs. `create_block_mask` may be called under `jax.jit`, with
    traced arrays in `captured`.

    Args:
      mask_mod: `mask_mod(batch, head, q_idx, kv_idx, *captured) -> bool`, as in `flex_attention`.
      batch, num_heads: B and N of query; None if the mask does not depend on the index, which is
        then 0.
      q_len, kv_len: T and S, the numbers of query rows and keys.
      captured: arrays for the function.
      block_size: the number of rows and keys of a block, or (rows, keys), each at least 1.

    Returns:
      A BlockMask for this function and these arrays. With another function or other arrays,
      `flex_attention` still hides the hidden blocks and shows the full blocks of the block mask.

    Raises:
      TypeError, ValueError: an argument does not fit; the message names it.

    Example:
      >>> causal = lambda batch, head, q_idx, kv_idx: q_idx >= kv_idx
      >>> jax_fa3.create_block_mask(causal, None, None, 256, 256).states[0, 0].tolist()
      [[1, 0], [3, 1]]

    Source: FlexAttention, arXiv:2412.05496.
    """
    batch = 1 if batch is None else _at_least(1, "batch", batch, "an int or None")
    heads = 1 if num_heads is None else _at_least(1, "num_heads", num_heads, "an int or None")
    q_len, kv_len = (
        _at_least(1, name, n, "an int") for name, n in (("q_len", q_len), ("kv_len", kv_len))
    )
    sides = block_size if isinstance(block_size, (tuple, list)) else (block_size,) * 2
    if len(sides) != 2:
        raise ValueError(f"block_size is {block_size!r}; expected an int or a pair of ints")
    rows, keys = (_at_least(1, "block_size", n, "an int or a pair of ints") for n in sides)
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(captured)]
    tree = jax.tree.structure(captured)
    function, closed_over = trace("mask_mod", mask_mod, tree.unflatten(leaves), len(leaves))
    mask = over_pairs(function, (*leaves, *closed_over))

    num_blocks = -(-q_len // rows), -(-kv_len // keys)
    column = jnp.arange(num_blocks[1] * keys, dtype=jnp.int32)

    def states_of(place):
        """The states of one row of blocks."""
        b, h, i = place
        row = i * rows + jnp.arange(rows, dtype=jnp.int32)
        # Rows and keys past the end repeat the last one.
        near = jnp.minimum(row, q_len - 1), jnp.minimum(column, kv_len - 1)
        seen = mask(b[None], h[None], *near)[0, 0].reshape(rows, num_blocks[1], keys)
        return PARTIAL * seen.any((0, 2)) + (FULL - PARTIAL) * seen.all((0, 2))

    extents = batch, heads, num_blocks[0]
    places = jnp.indices(extents, dtype=jnp.int32).reshape(3, -1)
    states = lax.map(states_of, tuple(places))
    states = states.astype(jnp.uint8).reshape(*extents, num_blocks[1])
    return BlockMask(states, q_len, kv_len, (rows, keys))


def kernel_table(
    states: jax.Array, block: tuple[int, int], seqlen_q: int, seqlen_k: int
) -> jax.Array:
    """int32 [b, h, groups of rows, words]: the states of blocks as the kernels read them. What is
    behind the last row or key has the state of the last block."""
    groups = -(-seqlen_q // GROUP_ROWS)
    words = -(-seqlen_k // (CLASS_KEYS * CLASSES_OF_WORD)) + 1  # read in pairs
    row = jnp.minimum(GROUP_ROWS * jnp.arange(groups), seqlen_q - 1) // block[0]
    key = jnp.minimum(CLASS_KEYS * jnp.arange(words * CLASSES_OF_WORD), seqlen_k - 1) // block[1]
    states = jnp.take(jnp.take(states, row, 2, mode="clip"), key, 3, mode="clip")
    states = states.reshape(*states.shape[:2], groups, words, CLASSES_OF_WORD)
    bits = states.astype(jnp.uint32) << 2 * jnp.arange(CLASSES_OF_WORD, dtype=jnp.uint32)
    return lax.bitcast_convert_type(bits.sum(-1, dtype=jnp.uint32), jnp.int32)


def _at_least(least: int, name: str, x: Any, expected: str) -> int:
    n = as_int(name, x, expected)
    if not least <= n < MAX_SEQLEN:
        raise ValueError(f"{name} is {n}; expected at least {least} and less than {MAX_SEQLEN}")
    return n
