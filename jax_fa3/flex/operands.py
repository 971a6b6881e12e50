"""The arrays of a call with score or mask functions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jax_fa3.operands import Extents, Operands, row

CAPTURED = "captured_"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FlexOperands(Operands):
    """Operands with the numbers of sequences and query heads, and with captured arrays.

    Numbers are arrays so that they are those of the whole call on every device, which has a part of
    them. A subclass has a field for each captured array; devices have these whole.
    """

    batch_number: Array | None = row("b", "int32", needs_whole="score_mod or mask_mod")
    head_number: Array | None = row("h", "int32")
    block_states: Array | None = row("bhij", "uint8", form="broadcast")

    @classmethod
    def of(
        cls,
        operands: Operands,
        extents: Extents,
        captured: Sequence[Array],
        block_states: Array | None,
    ) -> FlexOperands:
        """Of a call of these operands, of the user's shapes, and extents."""
        facts = tuple((x.ndim, bool(jnp.issubdtype(x.dtype, jnp.floating))) for x in captured)
        return _with_captured(facts)(
            **operands.present(),
            batch_number=jnp.arange(extents.batch, dtype=jnp.int32),
            head_number=jnp.arange(extents.num_heads_q, dtype=jnp.int32),
            block_states=block_states,
            **{f"{CAPTURED}{i}": x for i, x in enumerate(captured)},
        )

    @property
    def captured(self) -> dict[str, Array]:
        """The captured arrays by their fields, in order."""
        return {name: x for name, x in self.present().items() if name.startswith(CAPTURED)}


@functools.cache
def _with_captured(facts: tuple[tuple[int, bool], ...]) -> type[FlexOperands]:
    """FlexOperands with captured arrays: of each its number of dimensions, and whether it is
    floating, so that it has a gradient."""
    fields = [
        (
            f"{CAPTURED}{i}",
            Array | None,
            row("." * ndim, differentiable=is_floating, dear=True),
        )
        for i, (ndim, is_floating) in enumerate(facts)
    ]
    made = dataclasses.make_dataclass(
        "FlexOperands", fields, bases=(FlexOperands,), frozen=True, eq=False
    )
    return jax.tree_util.register_dataclass(made)
