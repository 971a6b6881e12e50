"""Whether the kernels can run a call, and if not, why: one sentence a user can act on.

Three questions, asked in this order: does the call want something no kernel does (bias, float32),
does this build have a kernel for its shapes, and is there a Hopper GPU. The native module `_C` is
imported here and nowhere else, so that the package also works where it is missing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

from jax_fa3 import validate
from jax_fa3.options import FLOAT8, NUM_SMS, SequenceParallel, resolve_deterministic, resolve_window

try:
    from jax_fa3 import _C
except ImportError as error:
    _C = None
    _import_error = str(error)

logger = logging.getLogger("jax_fa3")

KERNEL_DTYPES = {"bfloat16": "bf16", "float16": "fp16"}
MIN_SCALE = 2.0**-100  # the backward pass divides by it
COMPUTE_CAPABILITY = "9.0"  # H100, H200, GH200


def native() -> ModuleType | None:
    """The extension module, or None where it cannot be imported."""
    return _C


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
    validate.check_call(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        return_residual=return_residual,
        query_offset=query_offset,
        deterministic=deterministic,
        sequence_parallel=sequence_parallel,
        sm_margin=sm_margin,
        forward_dtype=forward_dtype,
        query_descale=query_descale,
        key_descale=key_descale,
        value_descale=value_descale,
        value_is_prepared=value_is_prepared,
    )
    value = validate.plain_value(key, value, value_is_prepared)
    window = resolve_window(local_window_size, is_causal)
    deterministic = resolve_deterministic(deterministic)
    return (
        call_reason(query, bias, mask, scale)
        or plan_reason(query, key, value, window, deterministic)
        or float8_reason(query, key, value, window, forward_dtype, value_is_prepared)
        or device_reason()
    )


def call_reason(query: Any, bias: Any, mask: Any, scale: float | None) -> str | None:
    """What the call asks for that no kernel does."""
    if bias is not None:
        return "the kernels take no bias"
    if mask is not None:
        return "the kernels take no dense mask (lengths, windows and is_causal are free)"
    if query.dtype.name not in (*KERNEL_DTYPES, FLOAT8):
        return f"the kernels take {' or '.join(KERNEL_DTYPES)}, not {query.dtype.name}"
    if scale is not None and 0 < abs(scale) < MIN_SCALE:
        return f"the kernels take scales of at least {MIN_SCALE:g} in magnitude, not {scale:g}"
    return None


def plan_reason(
    query: Any, key: Any, value: Any, window: tuple[int, int], deterministic: bool
) -> str | None:
    """Why this build has no kernel for the shapes of a legal call in a 16-bit dtype."""
    if query.dtype.name == FLOAT8:
        return None  # float8_reason's matter
    return _refusal(forward_plan, query, key, value, window) or _refusal(
        backward_plan, query, key, value, deterministic
    )


def float8_reason(
    query: Any,
    key: Any,
    value: Any,
    window: tuple[int, int],
    forward_dtype: Any,
    value_is_prepared: bool,
) -> str | None:
    """Why this build has no kernel for a legal forward pass in float8; None for other calls."""
    if forward_dtype is None and query.dtype.name != FLOAT8:
        return None
    return _refusal(forward_plan, query, key, value, window, forward_dtype, value_is_prepared)


def quantize_reason(query: Any, key: Any, value: Any) -> str | None:
    """Why the kernels do not round legal 16-bit arrays: they do where `forward_dtype` has them."""
    window = resolve_window(None, False)
    return float8_reason(query, key, value, window, FLOAT8, value_is_prepared=False)


def forward_plan(
    query: Any,
    key: Any,
    value: Any,
    window: tuple[int, int],
    forward_dtype: Any = None,
    value_is_prepared: bool = False,
) -> dict[str, Any]:
    """The kernel, its tiles, grid and, in float8, "workspace_bytes". Raises ValueError with the
    reason if none fits."""
    extents = _extents(query, key, value)
    if forward_dtype is None and query.dtype.name != FLOAT8:
        return _C.forward_plan(KERNEL_DTYPES[query.dtype.name], *extents, *window, NUM_SMS)
    prepared = bool(value_is_prepared) or forward_dtype is not None  # which prepares it by itself
    return _C.forward_float8_plan(*extents, *window, prepared, NUM_SMS)


def backward_plan(query: Any, key: Any, value: Any, deterministic: bool) -> dict[str, Any]:
    """The kernel, its tiles, grid and "workspace_bytes". Raises ValueError likewise."""
    name = KERNEL_DTYPES[query.dtype.name]
    return _C.backward_plan(name, *_extents(query, key, value), deterministic, NUM_SMS)


def _refusal(plan: Callable[..., dict[str, Any]], *call: Any) -> str | None:
    """Why there is no plan for a call."""
    if _C is None:
        return f"the extension module jax_fa3._C cannot be imported ({_import_error})"
    try:
        plan(*call)
    except ValueError as error:
        return str(error)
    return None


def _extents(query: Any, key: Any, value: Any) -> tuple[int, ...]:
    batch = query.shape[0] if query.ndim == 4 else 1
    seqlen_q, num_heads_q, head_dim = query.shape[-3:]
    seqlen_k, num_heads_kv, head_dim_v = value.shape[-3:]
    extents = (batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv, head_dim, head_dim_v)
    if not all(isinstance(n, int) for n in extents):
        raise ValueError(f"the kernels need static shapes, not query of shape {tuple(query.shape)}")
    return extents


def device_reason() -> str | None:
    """Why the kernels cannot run on the devices of the default backend."""
    if not has_gpu():
        return f"there is no NVIDIA GPU: the default backend is {jax.default_backend()!r}"
    for device in jax.local_devices():
        capability = getattr(device, "compute_capability", None)
        if capability != COMPUTE_CAPABILITY:
            return (
                f"the kernels need compute capability {COMPUTE_CAPABILITY} (H100, H200), and "
                f"{device.device_kind} has {capability}"
            )
    if _C is not None and not _C.cuda_enabled:
        return "jax_fa3 was built without CUDA kernels (JAX_FA3_CUDA=OFF)"
    return None


def has_gpu() -> bool:
    """Whether the default backend is a GPU's."""
    return jax.default_backend() == "gpu"


@functools.lru_cache(maxsize=256)
def log_fallback(reason: str) -> None:
    """Says, once for each reason, that a call runs through XLA and why."""
    logger.warning("dot_product_attention runs its XLA implementation: %s", reason)
