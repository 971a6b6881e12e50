"""`jax_fa3.explain`: what runs each call of a program, and why."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from jax_fa3 import route
from jax_fa3.arguments import is_array

PACKAGE = os.path.dirname(__file__)
_numbers = itertools.count()


class ExplainedCall(NamedTuple):
    """One call of a program; as a string, all of it in a line."""

    where: str  # file:line of the code that calls this package
    arguments: str  # those that are given, arrays as dtype[shape]
    runs: str  # "the Hopper kernels", "its XLA implementation", or what else a message calls it
    reason: str | None  # why not the kernels; None where they run forward and backward

    def __str__(self) -> str:
        why = f": {self.reason}" if self.reason else ""
        return f"{self.where}: {self.arguments}: runs {self.runs}{why}"


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[ExplainedCall, ...]:
    """What would run each attention call of `function(*args, **kwargs)` on this machine, and why.

    Calls of `append_to_cache` count too. The function is traced, not run. A call in a loop or scan
    counts once, one that `jax.grad` differentiates too: `runs` is of its forward and its backward
    pass.

    Args:
      function: any function of JAX, under jit or not.
      args, kwargs: its arguments, pytrees of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      The calls in the order in which they are traced.

    Raises:
      What tracing the function raises, such as NotImplementedError for implementation="fa3".

    Example:
      >>> x = jax.ShapeDtypeStruct((2, 1024, 16, 128), "float32")
      >>> (call,) = jax_fa3.explain(lambda x: jax_fa3.dot_product_attention(x, x, x), x)
      >>> call.reason
      'the kernels take bfloat16 or float16, not float32'
    """
    calls: list[ExplainedCall] = []

    def listen(arguments: Any, reasons: route.Reasons) -> None:
        calls.append(ExplainedCall(_caller(), _given(arguments), reasons.runs, reasons.first))

    token = route.listener.set(listen)
    try:
        # Metadata of its own, so that JAX traces again what it has traced before.
        with set_xla_metadata(jax_fa3_explain=next(_numbers)):
            jax.eval_shape(function, *args, **kwargs)
    finally:
        route.listener.reset(token)
    return tuple(calls)


def _caller() -> str:
    """Where the innermost code stands that is not of this package."""
    frames = reversed(traceback.extract_stack())
    frame = next(x for x in frames if not x.filename.startswith(PACKAGE + os.sep))
    return f"{frame.filename}:{frame.lineno}"


def _given(arguments: Any) -> str:
    """The arguments that are not None and differ from their defaults."""
    given = []
    for field in dataclasses.fields(arguments):
        x = getattr(arguments, field.name)
        is_default = x is None or x is field.default
        if not is_default and (is_array(x) or x != field.default):
            given.append(f"{field.name}={_shown(x)}")
    return ", ".join(given)


def _shown(x: Any) -> str:
    """Of arrays the types alone."""
    if is_array(x):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    if dataclasses.is_dataclass(x):
        parts = (f"{name}={_shown(part)}" for name, part in vars(x).items())
        return f"{type(x).__name__}({', '.join(parts)})"
    if isinstance(x, tuple):
        return f"({', '.join(map(_shown, x))})"
    return x.__qualname__ if inspect.isfunction(x) else repr(x)
