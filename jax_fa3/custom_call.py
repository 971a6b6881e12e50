"""One custom call, whose arrays have names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax


def custom_call(
    target: str,
    operands: Mapping[str, jax.Array],
    results: Mapping[str, jax.core.ShapedArray],
    aliases: dict[int, int] | None = None,
    **attributes: Any,
) -> dict[str, jax.Array]:
    """The results by name. Names are those of the rows of src/call/operands.h; the attributes
    `operands` and `results` bring them to the handler, which so learns what there is of the arrays
    that may be missing.

    aliases: numbers of operands whose memory becomes that of the results of these numbers.
    """
    call = jax.ffi.ffi_call(target, tuple(results.values()), input_output_aliases=aliases)
    names = dict(operands=" ".join(operands), results=" ".join(results))
    got = call(*operands.values(), **names, **attributes)
    return dict(zip(results, got, strict=True))
