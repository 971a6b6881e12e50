"""FlashAttention-3 for JAX: attention on Hopper kernels, and the same meaning everywhere else."""

from jax_fa3.api import dot_product_attention, is_supported
from jax_fa3.cached.flash import flash_attention_with_kvcache
from jax_fa3.cached.public import append_to_cache, cached_attention
from jax_fa3.cached.rotary import Rotary
from jax_fa3.combine import combine
from jax_fa3.context_parallel.layout import (
    striped_permute,
    striped_unpermute,
    zigzag_permute,
    zigzag_unpermute,
)
from jax_fa3.context_parallel.public import allgather_attention, ring_attention, ulysses_attention
from jax_fa3.doctor import doctor
from jax_fa3.explanation import ExplainedCall, explain
from jax_fa3.export_checks import DISABLED_CHECKS
from jax_fa3.flex.block_mask import BlockMask, create_block_mask
from jax_fa3.flex.public import flex_attention
from jax_fa3.float8.public import quantize_qkv
from jax_fa3.float8.rounding import QuantizedQKV
from jax_fa3.varlen import flash_attention_varlen
from jax_fa3.visibility.public import make_visibility
from jax_fa3.visibility.table import Visibility

__version__ = "0.2.0.dev0"

__all__ = [
    "BlockMask",
    "DISABLED_CHECKS",
    "__version__",
    "ExplainedCall",
    "QuantizedQKV",
    "Rotary",
    "Visibility",
    "allgather_attention",
    "append_to_cache",
    "cached_attention",
    "combine",
    "create_block_mask",
    "doctor",
    "dot_product_attention",
    "explain",
    "flash_attention_varlen",
    "flash_attention_with_kvcache",
    "flex_attention",
    "is_supported",
    "make_visibility",
    "quantize_qkv",
    "ring_attention",
    "striped_permute",
    "striped_unpermute",
    "ulysses_attention",
    "zigzag_permute",
    "zigzag_unpermute",
]
