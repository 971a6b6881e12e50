"""Arrays inside jax.shard_map: over which manual mesh axes they vary."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def vary_together(operands: Any) -> Any:
    """The operands, all varying over the union of their varying manual axes."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(operands)]
    union = frozenset().union(*varying)

    def cast(x):
        missing = tuple(sorted(union - jax.typeof(x).manual_axis_type.varying))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, operands)
