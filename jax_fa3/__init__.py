"""FlashAttention-3 for JAX: attention on Hopper kernels, and the same meaning everywhere else."""

from jax_fa3.api import dot_product_attention
from jax_fa3.doctor import doctor
from jax_fa3.support import is_supported

__version__ = "0.1.0"

__all__ = ["__version__", "doctor", "dot_product_attention", "is_supported"]
