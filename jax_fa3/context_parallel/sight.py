"""What a device's rows see of the keys of the whole sequence, and what they see of a piece's keys.

The call has the table of visibility of the whole sequence on every device. Each row sees one
interval of keys, which is an interval of any chunk of keys too, and of chunks that stand in the
order of the sequence. So keys travel without ids: a piece's table is made from the intervals of its
rows, counted from where its keys start.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_fa3 import mask
from jax_fa3.operands import Bundle, Extents, Operands, Sources, row
from jax_fa3.operations import LocalOperations
from jax_fa3.options import MAX_SEQLEN, UNBOUNDED, AttentionOptions, Route, VisibilityOptions
from jax_fa3.visibility import table
from jax_fa3.visibility.table import Plane


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sight(Bundle):
    """Of rows that stand in the order of the sequence; batch and heads may be 1 for all."""

    begin: jax.Array | None = row("bhs", "int32", counts="keys")  # of the keys that a row sees
    end: jax.Array | None = row("bhs", "int32", counts="keys")
    rows_end: jax.Array | None = row("bh", "int32", counts="queries")  # from here on is padding
    is_valid: jax.Array | None = row("bh", "bool")  # else all results are NaN

    @classmethod
    def of(cls, tables: jax.Array, seqlen_q: int, positions: jax.Array) -> Sight:
        """Of the rows at these positions, int32 [rows], in the tables of `seqlen_q` rows."""
        plane = Plane(tables)
        begin, end = (jnp.take(x, positions, axis=2, mode="clip") for x in plane.rows(seqlen_q))
        return cls(begin, end, plane.rows_end, plane.is_valid)

    def table(self, local: LocalOperations, route: Route, n: Extents) -> jax.Array:
        """The table of a piece of these extents, by whose rows and keys this is counted. Padding is
        that of the whole sequence: a row that sees none of these keys may see others."""
        options = VisibilityOptions(seqlen_q=n.seqlen_q, seqlen_k=n.seqlen_k)
        sources = Sources(kv_start=self.begin, kv_end=self.end)
        made = local.visibility(route, options, sources).visibility
        return table.with_summary(made, self.is_valid, self.rows_end)


def with_window(
    sight: Sight | None, options: AttentionOptions, operands: Operands, positions: jax.Array
) -> Sight | None:
    """What rows at these positions see, all keys where `sight` is None, if the window of `options`
    lets them; None where there is neither."""
    if not mask.has_window(options):
        return sight
    if sight is None:
        begin = jnp.zeros((1, 1, positions.size), jnp.int32)
        everywhere = jnp.full((1, 1), MAX_SEQLEN, jnp.int32)
        sight = Sight(begin, begin + MAX_SEQLEN, everywhere, everywhere > 0)
    position = mask.positions(options, operands, positions)[..., 0]
    begin, end = sight.begin, sight.end
    if options.window_left < UNBOUNDED:
        begin = jnp.maximum(begin, position - options.window_left)
    if options.window_right < UNBOUNDED:
        end = jnp.minimum(end, position + options.window_right + 1)
    return sight.replace(begin=begin, end=end)
