"""What Python values among the arguments must look like, and how a field of a record says so.

Each check takes the argument's name and what was got. Errors are those of validate.py.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_fa3.options import MAX_SEQLEN, NUM_SMS

IMPLEMENTATIONS = (None, "fa3", "xla")
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)

Check = Callable[[str, Any], None]


def argument(check: Check, default: Any = None) -> Any:
    """A field of a record of arguments, whose values are checked."""
    return dataclasses.field(default=default, metadata={"check": check})


def check_values(arguments: Any) -> None:
    """Raises unless the fields of a record that have checks are legal."""
    for name, check in _checks(arguments.__class__).items():
        check(name, getattr(arguments, name))


@functools.cache
def _checks(record: Any) -> dict[str, Check]:
    found = {field.name: field.metadata.get("check") for field in dataclasses.fields(record)}
    return {name: check for name, check in found.items() if check is not None}


def or_none(check: Check) -> Check:
    """None, or what `check` takes."""
    return lambda name, x: None if x is None else check(name, x)


def is_array(x: Any) -> bool:
    """Whether an argument that may be a Python number is an array."""
    return hasattr(x, "dtype") and not isinstance(x, np.integer)


def check_scale(name: str, scale: Any) -> None:
    """A finite Python number: the scale is compiled into the call."""
    if scale is None:
        return
    if isinstance(scale, jax.core.Tracer):
        raise TypeError(
            f"{name} is a traced array; expected a Python number (multiply query by a traced scale)"
        )
    if not isinstance(scale, numbers.Real) and (
        getattr(scale, "shape", None) != () or scale.dtype.kind not in "fiu"
    ):
        raise TypeError(f"{name} is {scale!r}; expected a Python number")
    if not abs(float(scale)) <= FLOAT32_MAX:
        raise ValueError(f"{name} is {float(scale)}; expected a finite float32 number")


def check_soft_cap(name: str, cap: Any) -> None:
    """None, or a finite Python number above 0: the cap is compiled into the call."""
    if cap is None:
        return
    expected = "a positive, finite float32 number, or None for no cap"
    if isinstance(cap, (bool, np.bool_)) or not isinstance(cap, numbers.Real):
        raise TypeError(f"{name} is {describe(cap)}; expected {expected}")
    if not FLOAT32_TINY <= float(cap) <= FLOAT32_MAX:
        raise ValueError(f"{name} is {float(cap)}; expected {expected}")


def check_flag(name: str, x: Any) -> None:
    """A Python bool."""
    if not isinstance(x, (bool, np.bool_)):
        raise TypeError(f"{name} is {describe(x)}; expected a Python bool")


def check_choice(choices: tuple[str | None, ...], name: str, x: Any) -> None:
    """One of `choices`."""
    if not (x is None or isinstance(x, str)) or x not in choices:
        raise ValueError(f"{name} is {describe(x)}; expected one of {choices}")


def check_implementation(name: str, x: Any) -> None:
    """One of IMPLEMENTATIONS; "cudnn" is jax.nn's word."""
    if isinstance(x, str) and x == "cudnn":
        raise ValueError(
            f"{name} is 'cudnn'; expected one of {IMPLEMENTATIONS}: None runs the kernels "
            "if they support the call, 'fa3' requires the kernels, and "
            "jax.nn.dot_product_attention runs cuDNN"
        )
    check_choice(IMPLEMENTATIONS, name, x)


def check_seed(name: str, x: Any) -> None:
    """None, or an int that numpy takes for a seed."""
    if x is not None and not 0 <= as_int(name, x, "an int or None") < 1 << 32:
        raise ValueError(f"{name} is {x}; expected at least 0 and less than 2**32")


def check_offset(name: str, x: Any) -> None:
    """A Python int, where it is not an array."""
    if x is None or is_array(x):
        return
    offset = as_int(name, x, "an int or an int32 array")
    if not -MAX_SEQLEN < offset < MAX_SEQLEN:
        raise ValueError(f"{name} is {offset}; expected less than {MAX_SEQLEN} in magnitude")


def check_window(name: str, window: Any) -> None:
    """None, a non-negative int, or a pair of them."""
    if window is None:
        return
    expected = "an int or a pair of ints, each at least 0 (None means no window)"
    sides = tuple(window) if isinstance(window, (tuple, list)) else (window,) * 2
    if len(sides) != 2:
        raise ValueError(f"{name} is {window!r}; expected {expected}")
    for side in sides:
        if as_int(name, side, expected, of=window) < 0:
            raise ValueError(f"{name} is {window!r}; expected {expected}")


def check_sm_margin(name: str, sm_margin: Any) -> None:
    """An int that leaves the kernels a multiprocessor."""
    expected = f"an int from 0 to {NUM_SMS - 1}"
    if not 0 <= as_int(name, sm_margin, expected) < NUM_SMS:
        raise ValueError(f"{name} is {sm_margin!r}; expected {expected}")


def as_int(name: str, x: Any, expected: str, of: Any = None) -> int:
    """`x` as an int; the error shows the argument that `x` is a part of, if it is one."""
    if not isinstance(x, (bool, np.bool_, jax.Array)):
        try:
            return operator.index(x)
        except TypeError:
            pass
    raise TypeError(f"{name} is {describe(x if of is None else of)}; expected {expected}")


def check_out_dtype(name: str, dtype: Any, allowed: tuple[str, ...]) -> None:
    """None, or one of these."""
    try:
        given = None if dtype is None else np.dtype(dtype).name
    except TypeError:
        given = ""
    if given is not None and given not in allowed:
        raise ValueError(f"{name} is {dtype!r}; expected None or {one_of(allowed)}")


def one_of(names: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def shape_of(x: Any) -> str:
    return str(tuple(x.shape))


def describe(x: Any) -> str:
    return "an array" if isinstance(x, jax.Array) else repr(x)
