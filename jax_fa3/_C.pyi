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

def plan(family: str, **choices: str | int | bool) -> dict[str, Any]:
    """Kernel, grid and, of a family that needs any, "workspace_bytes" of a call.

    family: "forward", "forward_float8", "backward" or "forward_cached".
    choices: what the plan depends on, for all of them batch, seqlen_q, seqlen_k, num_heads_q,
      num_heads_kv, head_dim, head_dim_v and num_sms; for attention without a cache also
      has_index_arrays, has_visibility and variant ("plain", "mask", "bias", "softcap" or "alibi");
      for the forward pass window_left and window_right. All but float8: dtype ("bf16" or "fp16");
      float8: value_is_prepared; backward: deterministic; a cache: is_ragged, with the rows of all
      sequences in seqlen_q, and page_size, 0 without a table of pages.

    Raises ValueError with the reason if no kernel fits, TypeError if a choice is missing.
    """
