"""Whether the kernels would run a call, and if not, why: the public question."""

from __future__ import annotations

from typing import Any

from jax_fa3 import route, validate
from jax_fa3.arguments import Arguments
from jax_fa3.options import SequenceParallel


def is_supported(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    query_offset: Any = None,
    deterministic: bool | None = None,
    sequence_parallel: SequenceParallel = "auto",
    sm_margin: int = 0,
    forward_dtype: Any = None,
    query_descale: Any = None,
    key_descale: Any = None,
    value_descale: Any = None,
    value_is_prepared: bool = False,
) -> str | None:
    """Why `dot_product_attention` would not run a call on the Hopper kernels; None if it would.

    Args: those of `dot_product_attention`, each array also as a `jax.ShapeDtypeStruct`.

    Returns:
      None when forward and backward of this call run on the kernels here, else the reason.

    Raises:
      ValueError, TypeError: as `dot_product_attention` does for the same arguments.

    Example:
      >>> x = jax.ShapeDtypeStruct((2, 1024, 16, 128), "float32")
      >>> jax_fa3.is_supported(x, x, x)
      'the kernels take bfloat16 or float16, not float32'
    """
    arguments = Arguments(**locals())
    validate.check_call(arguments)
    return route.reasons_of(arguments, arguments.options()).first
