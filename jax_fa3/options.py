"""Every static choice of one attention call, and the bundles of optional arrays that go with it.

AttentionOptions is built once in api.py, is hashable, and is the only thing besides arrays that
the layers below pass on. Its `to_ffi` is the dictionary that src/ffi/options.h decodes, field by
field. This file imports nothing of ours.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Literal, NamedTuple

import jax
import numpy as np

UNBOUNDED = 1 << 30  # columns: a window side that is off (kUnbounded in src/base/types.h)
MAX_SEQLEN = 1 << 28  # tokens: lengths and offsets stay below it (kMaxSeqlen)
NUM_SMS = 132  # of an H100 or H200 SXM; what a plan supports does not depend on it

FLOAT8 = "float8_e4m3fn"
BLOCK = 128  # rows of query or key that share a scale, where not all rows of a head do; a prepared
# value is filled up to a multiple of it

# "auto": the kernels where the program is lowered for CUDA, XLA elsewhere.
Route = Literal["auto", "fa3", "xla"]

# For a sequence that arrives split over a mesh axis: one of context.py's three, or a choice of it.
SequenceParallel = Literal["auto", "allgather", "ring", "ulysses", "error"]


class Index(NamedTuple):
    """Per-sequence runtime values, int32 [batch]; None where absent."""

    query_lengths: jax.Array | None = None
    key_lengths: jax.Array | None = None
    query_offset: jax.Array | None = None


class Dense(NamedTuple):
    """Arrays broadcastable to [batch, num_heads_q, seqlen_q, seqlen_k]; None where absent."""

    bias: jax.Array | None = None
    mask: jax.Array | None = None


class Descales(NamedTuple):
    """Scales of float8 arrays, float32; None where the arrays are of another type.

    One block for all rows of a head, or one for every BLOCK of them.
    """

    query: jax.Array | None = None  # [batch, num_heads_q, 1 | num_blocks(seqlen_q)]
    key: jax.Array | None = None  # [batch, num_heads_kv, 1 | num_blocks(seqlen_k)]
    value: jax.Array | None = None  # [batch, num_heads_kv]


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """The static choices of one call.

    Row i sees key j when i + offset - window_left <= j <= i + offset + window_right, with i and
    j inside the sequence's lengths. Causal attention is window_right <= 0.
    """

    scale: float  # > 0, multiplies query @ key^T
    window_left: int = UNBOUNDED  # columns, inclusive
    window_right: int = UNBOUNDED  # columns, inclusive
    query_offset: int = 0  # the offset of every sequence when has_query_offset is False
    deterministic: bool = False  # the backward pass gives equal bits when repeated
    rescale_threshold: float = 8.0  # log2 units a row maximum may grow before O is rescaled
    sm_margin: int = 0  # streaming multiprocessors that the kernels leave free
    has_query_lengths: bool = False
    has_key_lengths: bool = False
    has_query_offset: bool = False
    # Not part of the kernels' options:
    route: Route = "auto"
    sequence_parallel: SequenceParallel = "auto"
    quantized_forward: bool = False  # 16-bit operands are rounded to FLOAT8 for the forward pass
    value_is_prepared: bool = False  # as quantize.prepare_value has it

    @property
    def window(self) -> tuple[int, int]:
        return self.window_left, self.window_right

    def to_ffi(self, *, has_dlse: bool = False) -> dict[str, object]:
        """The dictionary attribute of both custom calls, in the exact widths C++ decodes."""
        return {
            "scale": np.float32(self.scale),
            "window_left": np.int32(self.window_left),
            "window_right": np.int32(self.window_right),
            "query_offset": np.int32(self.query_offset),
            "rescale_threshold": np.float32(self.rescale_threshold),
            "sm_margin": np.int32(self.sm_margin),
            "deterministic": self.deterministic,
            "has_query_lengths": self.has_query_lengths,
            "has_key_lengths": self.has_key_lengths,
            "has_query_offset": self.has_query_offset,
            "has_dlse": has_dlse,
        }


def num_blocks(seqlen: int) -> int:
    """Blocks of rows with a scale of their own; a sequence without rows has one too."""
    return max(-(-seqlen // BLOCK), 1)


def padded_keys(seqlen: int) -> int:
    """Keys of a prepared value, whole blocks (padded_keys in src/attention/prepared_value.h)."""
    return -(-seqlen // BLOCK) * BLOCK


def resolve_window(window: int | tuple[int, int] | None, is_causal: bool) -> tuple[int, int]:
    """(left, right) in columns, inclusive, of a checked `local_window_size` and `is_causal`."""
    if window is None:
        window = UNBOUNDED
    left, right = (window, window) if np.ndim(window) == 0 else window
    left, right = min(int(left), UNBOUNDED), min(int(right), UNBOUNDED)
    return left, min(right, 0) if is_causal else right


def resolve_deterministic(deterministic: bool | None) -> bool:
    """The caller's choice, or XLA's own determinism flags where there is none."""
    if deterministic is not None:
        return bool(deterministic)
    names = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")
    on = {name + value for name in names for value in ("", "=true", "=True", "=1")}
    return not on.isdisjoint(os.environ.get("XLA_FLAGS", "").split())
