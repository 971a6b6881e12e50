"""`jax_fa3.explain`: the implementation that runs each call of a program, and the reason."""

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
from jax_fa3.values import is_array

PACKAGE = os.path.dirname(__file__)
_numbers = itertools.count()


class ExplainedCall(NamedTuple):
    """One call of a program; str() gives one line."""

    where: str  # file:line of the code that calls this package
    arguments: str  # the given arguments, arrays as dtype[shape]
    runs: str  # "the Hopper kernels", "its XLA implementation", or another name from a message
    reason: str | None  # why the kernels do not run it; None if they run forward and backward

    def __str__(self) -> str:
        why = f": {self.reason}" if self.reason else ""
        return f"{self.where}: {self.arguments}: runs {self.runs}{why}"


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[ExplainedCall, ...]:
    """Lists the attention calls of `function(*args, **kwargs)`, what runs each one here, and why.

    The list includes calls of `append_to_cache`. The function is traced, not run. A call in a loop
    or scan counts once, and so does a call that `jax.grad` differentiates: `runs` describes its
    forward and its backward pass.

    Args:
      function: any JAX function, jitted or not.
      args, kwargs: the arguments of the function, pytrees of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      The calls in the order of tracing.

    Raises:
      The errors of tracing the function, such as NotImplementedError for implementation="fa3".

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
        # Unique metadata, so that JAX does not reuse an earlier trace.
        with set_xla_metadata(jax_fa3_explain=next(_numbers)):
            jax.eval_shape(function, *args, **kwargs)
    finally:
        route.listener.reset(token)
    return tuple(calls)


def _caller() -> str:
    """The file and line of the innermost frame outside of this package."""
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
    """A value as text; arrays as their types."""
    if is_array(x):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    if dataclasses.is_dataclass(x):
        parts = (f"{name}={_shown(part)}" for name, part in vars(x).items())
        return f"{type(x).__name__}({', '.join(parts)})"
    if isinstance(x, tuple):
        return f"({', '.join(map(_shown, x))})"
    return x.__qualname__ if inspect.isfunction(x) else repr(x)
