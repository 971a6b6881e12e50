"""What `jax.export` is to be told of programs that run the kernels."""

from __future__ import annotations

import jax
import jax.export

from jax_fa3 import ffi
from jax_fa3.cached import ffi as cached_ffi

# jax.export refuses custom calls that nobody vouches for: `disabled_checks` of programs for CUDA.
TARGETS = (*ffi.TARGETS, *cached_ffi.TARGETS)
DISABLED_CHECKS = tuple(map(jax.export.DisabledSafetyCheck.custom_call, TARGETS))
