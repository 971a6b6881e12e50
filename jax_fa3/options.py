"""Every static choice of one attention call.

AttentionOptions is built once from the public arguments, is hashable, and is the only thing besides
arrays that the layers below pass on. What the kernels know of it is the dictionary that
src/ffi/options.h decodes, field by field. This file imports nothing of ours.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable
from typing import Literal, NamedTuple

UNBOUNDED = 1 << 30  # columns: a window side that is off (kUnbounded in src/call/types.h)
MAX_SEQLEN = 1 << 28  # tokens: lengths and offsets stay below it (kMaxSeqlen)
NUM_SMS = 132  # of an H100 or H200 SXM; what a plan supports does not depend on it

FLOAT8 = "float8_e4m3fn"
BLOCK = 128  # rows of query or key that share a scale, where not all rows of a head do; a prepared
# value is filled up to a multiple of it

# "auto": the kernels where the program is lowered for CUDA, XLA elsewhere.
Route = Literal["auto", "fa3", "xla"]

# For a sequence that arrives split over a mesh axis: a strategy of context_parallel, a choice of
# it, or none.
SequenceParallel = Literal["auto", "allgather", "ring", "ulysses", "error"]


class Routes(NamedTuple):
    """What runs each direction of a call, decided once in route.py."""

    forward: Route = "auto"  # also of what rounds 16-bit arrays to float8
    backward: Route = "auto"


def _of_python(default):
    """A choice that the kernels do not know."""
    return dataclasses.field(default=default, metadata={"of_python": True})


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """The static choices of one call; those that the kernels know in the order of their struct.

    Row i sees key j when i + offset - window_left <= j <= i + offset + window_right, with i and
    j inside the sequence's lengths. Causal attention is window_right <= 0.
    """

    scale: float  # > 0, multiplies query @ key^T
    window_left: int = UNBOUNDED  # columns, inclusive
    window_right: int = UNBOUNDED  # columns, inclusive
    query_offset: int = 0  # the offset of every sequence where there is no array of them
    rescale_threshold: float = 8.0  # log2 units a row maximum may grow before O is rescaled
    softcap: float = 0.0  # > 0: scores become softcap * tanh(score / softcap); 0 is off
    sm_margin: int = 0  # streaming multiprocessors that the kernels leave free
    deterministic: bool = False  # the backward pass gives equal bits when repeated

    routes: Routes = _of_python(Routes())
    sequence_parallel: SequenceParallel = _of_python("auto")
    forward_dtype: str | None = _of_python(None)  # FLOAT8: 16-bit operands are rounded to it first
    out_dtype: str | None = _of_python(None)  # None: query's
    return_residual: bool = _of_python(False)  # the LSE is wanted too, so it may have a cotangent
    return_max_logits: bool = _of_python(False)  # the largest logit of each head is wanted too
    dear_gradients: tuple[str, ...] | None = _of_python(None)  # of these `dear` rows; None: of all
    functions: Hashable = _of_python(None)  # flex.functions.Functions, of scores and masks

    @classmethod
    def of_kernels(cls) -> tuple[str, ...]:
        """The names of the choices that the kernels know."""
        fields = dataclasses.fields(cls)
        return tuple(field.name for field in fields if "of_python" not in field.metadata)

    @property
    def window(self) -> tuple[int, int]:
        return self.window_left, self.window_right

    @property
    def is_ordinary_code(self) -> bool:
        """Whether JAX can differentiate the call in any mode and to any order."""
        is_on_xla = set(self.routes) == {"xla"} and self.sequence_parallel == "auto"
        return is_on_xla and self.forward_dtype is None


@dataclasses.dataclass(frozen=True)
class VisibilityOptions:
    """The static choices of one table of visibility, in the order of their attributes."""

    seqlen_q: int
    seqlen_k: int
    query_offset: int = 0  # for chunks, where there is no array of offsets
    attention_chunk: int = 0  # keys of a chunk; 0 is off
    window_left: int = UNBOUNDED  # columns, inclusive, of each document of cu_seqlens
    window_right: int = UNBOUNDED

    @property
    def window(self) -> tuple[int, int]:
        return self.window_left, self.window_right


def num_blocks(seqlen: int) -> int:
    """Blocks of rows with a scale of their own; a sequence without rows has one too."""
    return max(-(-seqlen // BLOCK), 1)


def padded_bias_keys(seqlen: int) -> int:
    """Keys of a bias, whole packets of 16 bytes (padded_bias_keys in src/call/problem.h)."""
    return -(-seqlen // 8) * 8


def dense_mask_words(rows: int, seqlen_k: int) -> int:
    """Words of a plane of a dense mask's table: classes of blocks of 64 rows and 16 keys, a bit for
    each row and key in both orders, padding (DenseMaskLayout in src/attention/dense_mask.h). `rows`
    is 1 where all rows have the same mask."""
    classes = -(-rows // 64) * (-(-seqlen_k // 256) + 1)
    return classes + rows * -(-seqlen_k // 32) + seqlen_k * -(-rows // 32) + 8


def padded_keys(seqlen: int) -> int:
    """Keys of a prepared value, whole blocks (padded_keys in src/attention/prepared_value.h)."""
    return -(-seqlen // BLOCK) * BLOCK


def resolve_window(window: int | tuple[int, int] | None, is_causal: bool) -> tuple[int, int]:
    """(left, right) in columns, inclusive, of a checked `local_window_size` and `is_causal`."""
    if window is None:
        window = UNBOUNDED
    left, right = window if isinstance(window, (tuple, list)) else (window, window)
    left, right = min(int(left), UNBOUNDED), min(int(right), UNBOUNDED)
    return left, min(right, 0) if is_causal else right


def resolve_deterministic(deterministic: bool | None) -> bool:
    """The caller's choice, or XLA's own determinism flags where there is none."""
    if deterministic is not None:
        return bool(deterministic)
    return not _DETERMINISTIC_FLAGS.isdisjoint(os.environ.get("XLA_FLAGS", "").split())


_DETERMINISTIC_FLAGS = frozenset(
    name + value
    for name in ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")
    for value in ("", "=true", "=True", "=1")
)
