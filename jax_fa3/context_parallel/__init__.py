"""Attention over a sequence that is divided over a mesh axis: operations.py's two operations.

Every function here runs once on each device of the axis, with the axis name bound (inside
jax.shard_map, or where a partitioned operation is lowered), on 4-D local arrays of equal shape on
all devices. Options and positions (lengths, offsets) speak of the whole sequence. Pieces of the
work are calls of `local`, which is operations.py, or what partitions these further.

Three strategies, each a forward and a backward function:

    allgather   every device attends to its own keys, and gathers all others' meanwhile
    ring        keys and values travel from device to device, one part at a time
    ulysses     sequence parts are exchanged for heads, and each device attends to whole sequences

An exchange hides under kernels that do not need it. XLA has one under way at a time, and does not
know how long a kernel takes: pieces.beside gives each exchange its kernels.

What becomes of an array follows from its row: arrays of query rows stay with the queries, arrays of
key rows go where keys go, positions are counted anew for each piece. What has no such rule raises.
What has no rows is whole on every device. A table of visibility is that of the whole sequence;
pieces have tables of their own (sight.py). Of gradients without rows a device gives a share, of the
largest logits those of its own rows, of which `Divided` takes the maximum.

A layout says which rows a device holds: "contiguous" (device r the r-th part) or "zigzag" (of 2N
chunks the r-th and the r-th from the end, so that causal work is equal) or "striped" (stripes of
256 rows dealt round, so that documents' work is nearly equal; see layout.py).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from jax import lax

from jax_fa3 import mask, operations
from jax_fa3.context_parallel import allgather, ring, ulysses
from jax_fa3.context_parallel.layout import Axis, Layout, Part
from jax_fa3.operands import Operands, Outputs
from jax_fa3.operations import LocalOperations
from jax_fa3.options import AttentionOptions

Strategy = Literal["allgather", "ring", "ulysses"]

GATHER_LIMIT = 4 << 30  # bytes of gathered keys and values: 1M tokens, 8 heads of 128, in bf16

FEW_KEYS = 4  # query heads of a key head from which on there is little to gather

_STRATEGIES = {"allgather": allgather, "ring": ring, "ulysses": ulysses}


class Divided(NamedTuple):
    """The two operations where the sequence is divided over a mesh axis, or several."""

    strategy: Strategy
    axis_name: str | tuple[str, ...]
    layout: Layout = "contiguous"
    local: LocalOperations = operations

    def forward(self, options: AttentionOptions, operands: Operands) -> Outputs:
        _check(operands)
        part = self._part()
        outputs = _STRATEGIES[self.strategy].forward(part, options, operands)
        if outputs.max_logits is None:
            return outputs
        return outputs.replace(max_logits=lax.pmax(outputs.max_logits, part.axis.name))

    def backward(
        self,
        options: AttentionOptions,
        operands: Operands,
        outputs: Outputs,
        cotangents: Outputs,
    ) -> Operands:
        _check(operands)
        # Else XLA takes these exchanges for those of `forward` and keeps their results until here,
        # or has both made by one. Tables of visibility are to be made by one.
        table = operands.visibility
        bundles = operands.replace(visibility=None), outputs, cotangents
        operands, outputs, cotangents = lax.optimization_barrier(bundles)
        operands = operands.replace(visibility=table)
        strategy = _STRATEGIES[self.strategy]
        return strategy.backward(self._part(), options, operands, outputs, cotangents)

    def _part(self) -> Part:
        return Part(self.local, Axis.bound(self.axis_name), self.layout)


def choose(options: AttentionOptions, operands: Operands, axis_size: int) -> Strategy:
    """The strategy for these local arrays, or their types, over `axis_size` devices.

    A ring moves as many bytes as gathering does, beside all of its kernels and not the first ones
    alone, and it holds one part of the keys at a time; it merges a partial result at each step.
    Prefer it where a window skips most steps, where the gathered keys are as many as all queries
    (without groups of query heads), and where they take too much memory. Otherwise gather: few
    large calls, and one merge. Ulysses depends on the number of heads and moves queries and outputs
    too; it is never picked.

    With a table of visibility keys are gathered, without groups of heads too: where documents end
    is not known when a program is traced, and a ring's permutes run alone in steps that see
    nothing. With slopes the exchanges of gathering run alone and a ring's do not: a ring, unless
    FEW_KEYS query heads or more share each key head.
    """
    n = operands.extents
    row_bytes = n.num_heads_kv * (n.head_dim + n.head_dim_v) * operands.key.dtype.itemsize
    gathered = n.batch * n.seqlen_k * axis_size * row_bytes
    few_steps = mask.reach(options) <= (axis_size // 2 - 1) * n.seqlen_k
    if few_steps or gathered > GATHER_LIMIT:
        return "ring"
    if operands.visibility is not None:
        return "allgather"
    groups = FEW_KEYS if operands.alibi_slopes is not None else 2
    return "ring" if n.num_heads_q < groups * n.num_heads_kv else "allgather"


def _check(operands: Operands) -> None:
    """Raises for an array that no strategy would carry."""
    for name in operands.present():
        row = operands.rows()[name]
        if row.needs_whole:
            raise ValueError(f"{name} is given; expected whole sequences with {row.needs_whole}")
        if row.differentiable and row.splits and name not in ("query", "key", "value"):
            raise NotImplementedError(f"{name} has no gradient where sequences are divided")
