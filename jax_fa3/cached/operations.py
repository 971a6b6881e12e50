"""The two operations of caches on one device's arrays: custom calls on CUDA, XLA code elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jax_fa3.cached import ffi, xla
from jax_fa3.cached.problem import (
    Appended,
    AppendOperands,
    AppendOptions,
    Attended,
    CachedOperands,
    CachedOptions,
)


def attend(options: CachedOptions, operands: CachedOperands) -> Attended:
    return _run(ffi.attend, xla.attend, options, operands)


def append(options: AppendOptions, operands: AppendOperands) -> Appended:
    return _run(ffi.append, xla.append, options, operands)


def _run(kernel: Callable, portable: Callable, options: Any, operands: Any) -> Any:
    """By platform when the program is lowered; calls some of whose arrays are empty are XLA's."""
    kernel, portable = (functools.partial(x, options) for x in (kernel, portable))
    if options.route == "xla" or any(0 in x.shape for x in jax.tree.leaves(operands)):
        return portable(operands)
    if options.route == "fa3":
        return kernel(operands)
    return lax.platform_dependent(operands, cuda=kernel, default=portable)
