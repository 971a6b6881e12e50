"""The safety checks to disable when `jax.export` exports programs that run the kernels."""

from __future__ import annotations

import jax
import jax.export

from jax_fa3 import ffi
from jax_fa3.cached import ffi as cached_ffi

# jax.export refuses custom calls without a compatibility guarantee. Pass these checks as
# `disabled_checks` for CUDA programs.
TARGETS = (*ffi.TARGETS, *cached_ffi.TARGETS)
DISABLED_CHECKS = tuple(map(jax.export.DisabledSafetyCheck.custom_call, TARGETS))
