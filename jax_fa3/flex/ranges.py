"""Which values the integers in a text can have.

Indices of rows and keys are within a sequence, and much that is computed of them is as narrow: then
a comparison may be decided, a clamp or a wrapped index be no work, and a cast to a float be cheap.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

Range = tuple[int, int]  # the least and the greatest, inclusive

# Below it, a cast to float32 needs no conversion, of which the hardware makes few at a time:
# jfa_from_small in text.py.
SMALL = 1 << 22


def whole(dtype: str) -> Range:
    """All that a type of integers holds."""
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def of_literal(text: str) -> Range | None:
    """That of a literal of text.py; None of another value, and of the lowest integers."""
    found = re.fullmatch(r"\(?(-?\d+)(?:u|ll|ull)?\)?", text)
    return (int(found[1]),) * 2 if found else None


def _of_products(x: Range, y: Range) -> Range:
    corners = [a * b for a in x for b in y]
    return min(corners), max(corners)


_OPERATIONS: dict[str, Callable[..., Range]] = {
    "add": lambda x, y: (x[0] + y[0], x[1] + y[1]),
    "sub": lambda x, y: (x[0] - y[1], x[1] - y[0]),
    "mul": _of_products,
    "square": lambda x: _of_products(x, x) if x[0] >= 0 else (0, max(x[0] ** 2, x[1] ** 2)),
    "neg": lambda x: (-x[1], -x[0]),
    "abs": lambda x: (max(x[0], -x[1], 0), max(-x[0], x[1])),
    "sign": lambda x: (int(x[0] > 0) - int(x[0] < 0), int(x[1] > 0) - int(x[1] < 0)),
    "min": lambda x, y: (min(x[0], y[0]), min(x[1], y[1])),
    "max": lambda x, y: (max(x[0], y[0]), max(x[1], y[1])),
}


def of_operation(name: str, dtype: str, *operands: Range) -> Range:
    """That of a result in this dtype, which wraps around what it does not hold."""
    least, greatest = whole(dtype)
    if name == "clamp":
        low, x, high = operands
        low = of_operation("max", dtype, low, x)
        return of_operation("min", dtype, low, high)
    if name not in _OPERATIONS:
        return least, greatest
    found = _OPERATIONS[name](*operands)
    return found if least <= found[0] and found[1] <= greatest else (least, greatest)


def chosen(name: str, x: Range, y: Range) -> int | None:
    """Which of two operands their minimum or maximum always is, if it is one of them."""
    if name == "max":
        return 0 if x[0] >= y[1] else 1 if y[0] >= x[1] else None
    return 0 if x[1] <= y[0] else 1 if y[1] <= x[0] else None


def decided(name: str, x: Range, y: Range) -> bool | None:
    """What a comparison always says, if that is known."""
    if name in ("gt", "ge"):
        return decided({"gt": "lt", "ge": "le"}[name], y, x)
    if name == "ne":
        same = decided("eq", x, y)
        return None if same is None else not same
    if name == "eq":
        return False if x[1] < y[0] or y[1] < x[0] else None
    is_strict = name == "lt"
    if x[1] < y[0] or (not is_strict and x[1] == y[0]):
        return True
    if x[0] > y[1] or (is_strict and x[0] == y[1]):
        return False
    return None
