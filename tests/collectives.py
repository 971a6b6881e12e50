"""What a compiled program sends between devices."""

import math
import re

import numpy as np

_KINDS = "all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|reduce-scatter"
_INSTRUCTION = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_ARRAY = re.compile(r"(bf16|f16|f32|s32|pred|u8)\[([\d,]*)\]")
_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "pred": 1, "u8": 1}


def collectives(compiled):
    """[(kind, bytes of its results on one device)] of a program's collectives, in order.

    The CPU's compiler widens bfloat16 to float32 on the way: bytes there are those of float32.
    """
    return [
        (match.group(2), sum(map(_size, _ARRAY.findall(match.group(1)))))
        for match in _INSTRUCTION.finditer(compiled.as_text())
    ]


def total_bytes(compiled):
    return int(np.sum([size for _, size in collectives(compiled)]))


def _size(array):
    dtype, extents = array
    return _BYTES[dtype] * math.prod(int(n) for n in extents.split(",") if n)
