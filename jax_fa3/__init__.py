"""FlashAttention-3 for JAX: attention on Hopper kernels, and the same meaning everywhere else."""

from jax_fa3.api import dot_product_attention, is_supported
from jax_fa3.context_parallel.layout import zigzag_permute, zigzag_unpermute
from jax_fa3.context_parallel.public import allgather_attention, ring_attention, ulysses_attention
from jax_fa3.doctor import doctor
from jax_fa3.explanation import ExplainedCall, explain
from jax_fa3.ffi import DISABLED_CHECKS
from jax_fa3.float8.public import quantize_qkv
from jax_fa3.float8.rounding import QuantizedQKV
from jax_fa3.varlen import flash_attention_varlen
from jax_fa3.visibility.public import make_visibility
from jax_fa3.visibility.table import Visibility

__version__ = "0.1.0"

__all__ = [
    "DISABLED_CHECKS",
    "__version__",
    "ExplainedCall",
    "QuantizedQKV",
    "Visibility",
    "allgather_attention",
    "doctor",
    "dot_product_attention",
    "explain",
    "flash_attention_varlen",
    "is_supported",
    "make_visibility",
    "quantize_qkv",
    "ring_attention",
    "ulysses_attention",
    "zigzag_permute",
    "zigzag_unpermute",
]
