"""The native module: kernel plans, the list of kernels and the FFI handlers (src/module.cc)."""

from typing import Any

cuda_enabled: bool
"""Whether kernels and handlers are linked in."""

def registrations() -> dict[str, Any]:
    """FFI target name -> handler capsule; empty without CUDA."""

def compiled_kernels() -> list[dict[str, Any]]:
    """The kernels linked in, one dictionary each; empty without CUDA."""

def listed_kernels() -> list[dict[str, Any]]:
    """The kernels of the build's list, compiled or not."""

def forward_plan(
    dtype: str,  # "bf16" | "fp16"
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    head_dim_v: int,
    window_left: int,
    window_right: int,
    has_index_arrays: bool,
    has_visibility: bool,
    variant: str,  # "plain", "mask", "bias", "softcap" or "alibi"
    num_sms: int,
) -> dict[str, Any]:
    """Kernel, tiles and grid of a forward call. Raises ValueError with the reason if none fits."""

def forward_float8_plan(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    head_dim_v: int,
    window_left: int,
    window_right: int,
    has_index_arrays: bool,
    has_visibility: bool,
    value_is_prepared: bool,
    num_sms: int,
) -> dict[str, Any]:
    """Kernel, tiles, grid and "workspace_bytes" of a forward call on e4m3 arrays. Raises ValueError
    likewise."""

def backward_plan(
    dtype: str,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    head_dim_v: int,
    has_index_arrays: bool,
    has_visibility: bool,
    variant: str,
    deterministic: bool,
    num_sms: int,
) -> dict[str, Any]:
    """Kernel, tiles, grid and "workspace_bytes" of a backward call. Raises ValueError likewise."""
