"""CUDA C text of straight-line functions: types, literals, helper functions, statements.

The same text compiles for the device, with NVRTC and without headers, and for the host as C++.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_fa3.flex.ranges import Range, of_literal, whole

# float16 and bfloat16 are floats that hold a value of the narrow type.
TYPES = {
    "bool": "bool",
    "int8": "signed char",
    "int16": "short",
    "int32": "int",
    "int64": "long long",
    "uint8": "unsigned char",
    "uint16": "unsigned short",
    "uint32": "unsigned",
    "uint64": "unsigned long long",
    "float32": "float",
    "bfloat16": "float",
    "float16": "float",
}
# Where the type of an element in memory is another one.
MEMORY_TYPES = {"bool": "unsigned char", "bfloat16": "unsigned short", "float16": "unsigned short"}

INTEGERS = tuple(name for name in TYPES if "int" in name)
FLOATS = ("float32", "bfloat16", "float16")
NARROW_FLOATS = ("bfloat16", "float16")

MAX_CAPTURED = 8

PREAMBLE = f"""\
#ifdef __CUDACC__
#define JFA_FUNCTION extern "C" __device__
#define JFA_HELPER static __device__ __forceinline__
#define JFA_TABLE static __device__ const
#define JFA_INFINITY __int_as_float(0x7f800000)
#define JFA_NAN __int_as_float(0x7fc00000)
#else
#include <math.h>
#include <string.h>
#define JFA_FUNCTION extern "C"
#define JFA_HELPER static inline
#define JFA_TABLE static const
#define JFA_INFINITY __builtin_inff()
#define JFA_NAN __builtin_nanf("")
#endif

struct JfaCaptured {{
  const void* array[{MAX_CAPTURED}];  // row-major, in the order of the captured arrays
}};

struct JfaScore {{
  float score;
  float slope;  // the derivative of the score that is returned by the score that is given
}};
"""


def unsigned(dtype: str) -> str:
    """The C type in which integers of a type wrap around instead of overflowing."""
    return "unsigned long long" if dtype.endswith("64") else "unsigned"


def literal(value: Any, dtype: str) -> str:
    """A number as a C expression that may stand at any place in another."""
    if dtype == "bool":
        return "true" if value else "false"
    if dtype in FLOATS:
        number = np.float32(np.asarray(value, jnp.dtype(dtype)))
        if np.isnan(number):
            return "JFA_NAN"
        if np.isinf(number):
            return "JFA_INFINITY" if number > 0 else "(-JFA_INFINITY)"
        text = f"{number}f"
    else:
        whole = int(value)
        suffix = {"uint32": "u", "int64": "ll", "uint64": "ull"}.get(dtype, "")
        text = f"{whole}{suffix}"
        if dtype in ("int32", "int64") and whole == np.iinfo(dtype).min:
            text = f"{whole + 1}{suffix} - 1"  # C has no literal of the lowest integer
    return f"({text})" if text.startswith("-") else text


def _helpers() -> dict[str, str]:
    """Helper functions by name, each below those that it calls."""
    texts = [
        """\
JFA_HELPER unsigned jfa_bits(float x) {
#ifdef __CUDACC__
  return __float_as_uint(x);
#else
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}
""",
        """\
JFA_HELPER float jfa_float(unsigned bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
#endif
}
""",
        """\
JFA_HELPER float jfa_round_bfloat16(float x) {
  const unsigned bits = jfa_bits(x);
  return x != x ? x : jfa_float((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}
""",
        """\
JFA_HELPER float jfa_round_float16(float x) {
  if (!(fabsf(x) < 65520.0f)) return x != x ? x : x * JFA_INFINITY;
  if (fabsf(x) < 6.103515625e-05f) return rintf(x * 16777216.0f) / 16777216.0f;
  const unsigned bits = jfa_bits(x);
  return jfa_float((bits + 0xfffu + ((bits >> 13) & 1u)) & 0xffffe000u);
}
""",
        """\
JFA_HELPER float jfa_load_bfloat16(unsigned short x) { return jfa_float((unsigned)x << 16); }
""",
        """\
JFA_HELPER float jfa_load_float16(unsigned short x) {
  const unsigned sign = (x & 0x8000u) << 16;
  const unsigned exponent = (x >> 10) & 31u;
  const unsigned fraction = x & 0x3ffu;
  if (exponent == 31u) return jfa_float(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0u) return jfa_float(sign | ((exponent + 112u) << 23) | (fraction << 13));
  const float tiny = (float)fraction / 16777216.0f;
  return sign ? -tiny : tiny;
}
""",
        # NaN if either is; C's fminf and fmaxf return the other one.
        """\
JFA_HELPER float jfa_min(float x, float y) { return x != x ? x : y != y ? y : x < y ? x : y; }
""",
        """\
JFA_HELPER float jfa_max(float x, float y) { return x != x ? x : y != y ? y : x < y ? y : x; }
""",
        """\
JFA_HELPER float jfa_sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x; }
""",
        """\
JFA_HELPER float jfa_logistic(float x) { return 1.0f / (1.0f + expf(-x)); }
""",
        # Without branches, for which a kernel's matrix products would have to wait. Its error is
        # 3e-7 at most.
        """\
JFA_HELPER float jfa_tanh(float x) {
#ifdef __CUDACC__
  return 1.0f - __fdividef(2.0f, exp2f(2.88539008f * x) + 1.0f);
#else
  return tanhf(x);
#endif
}
""",
        # With a relative error of 2^-11 at most.
        """\
JFA_HELPER float jfa_rough_tanh(float x) {
#ifdef __CUDACC__
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return tanhf(x);
#endif
}
""",
        # An integer less than 2^22 in magnitude as the mantissa of a float from 2^23 on. That is
        # 3 * 2^22 more, of which a difference of two has nothing.
        """\
JFA_HELPER float jfa_raised(int x) {
#ifdef __CUDACC__
  return __int_as_float(x + 0x4b400000);
#else
  return (float)x;
#endif
}
""",
        """\
JFA_HELPER float jfa_from_small(int x) {
#ifdef __CUDACC__
  return jfa_raised(x) - 12582912.0f;
#else
  return (float)x;
#endif
}
""",
        """\
JFA_HELPER float jfa_rsqrt(float x) {
#ifdef __CUDACC__
  return rsqrtf(x);
#else
  return 1.0f / sqrtf(x);
#endif
}
""",
        """\
JFA_HELPER int jfa_population_count(unsigned long long x) {
#ifdef __CUDACC__
  return __popcll(x);
#else
  return __builtin_popcountll(x);
#endif
}
""",
        """\
JFA_HELPER int jfa_leading_zeros(unsigned long long x) {
#ifdef __CUDACC__
  return __clzll((long long)x);
#else
  return x ? __builtin_clzll(x) : 64;
#endif
}
""",
    ]
    texts += [text for dtype in INTEGERS for text in _integer_helpers(dtype)]
    return {re.findall(r"\bjfa_\w+", text)[0]: text for text in texts}


def _integer_helpers(dtype: str) -> list[str]:
    """What XLA does where C has no answer: divisions by 0, shifts past the width, casts of floats
    that do not fit."""
    c, u, info = TYPES[dtype], unsigned(dtype), np.iinfo(dtype)
    low, high = literal(info.min, dtype), literal(info.max, dtype)
    is_signed = info.min < 0
    by_minus_one = (
        f"\n  if (y == -1) return ({c})(0 - ({u})x);" if is_signed else "",
        "\n  if (y == -1) return 0;" if is_signed else "",
    )
    by_zero = "-1" if is_signed else high
    too_far = f"y < 0 || y >= {info.bits}" if is_signed else f"y >= {info.bits}u"
    as_unsigned, as_signed = TYPES[f"uint{info.bits}"], TYPES[f"int{info.bits}"]
    return [
        f"""\
JFA_HELPER {c} jfa_divide_{dtype}({c} x, {c} y) {{
  if (y == 0) return {by_zero};{by_minus_one[0]}
  return ({c})(x / y);
}}
""",
        f"""\
JFA_HELPER {c} jfa_remainder_{dtype}({c} x, {c} y) {{
  if (y == 0) return x;{by_minus_one[1]}
  return ({c})(x % y);
}}
""",
        f"""\
JFA_HELPER {c} jfa_shift_left_{dtype}({c} x, {c} y) {{
  return {too_far} ? 0 : ({c})(({u})x << y);
}}
""",
        f"""\
JFA_HELPER {c} jfa_shift_right_logical_{dtype}({c} x, {c} y) {{
  return {too_far} ? 0 : ({c})(({as_unsigned})x >> y);
}}
""",
        f"""\
JFA_HELPER {c} jfa_shift_right_arithmetic_{dtype}({c} x, {c} y) {{
  const {as_signed} sign = ({as_signed})x < 0 ? -1 : 0;
  return ({c})({too_far} ? sign : ({as_signed})x >> y);
}}
""",
        f"""\
JFA_HELPER {c} jfa_to_{dtype}(float x) {{
  if (x != x) return 0;
  if (x <= {literal(float(info.min), "float32")}) return {low};
  if (x >= {literal(float(info.max + 1), "float32")}) return {high};
  return ({c})x;
}}
""",
    ]


HELPERS = _helpers()


@dataclasses.dataclass(frozen=True)
class Statement:
    """`const type name = text;`, the operands' names put into the text."""

    type: str
    template: str
    operands: tuple[str, ...]


class Program:
    """Statements without side effects, each of them once, from which functions are written.

    Values are strings: a parameter's name, a literal, or "%n", the result of statement n.
    """

    def __init__(self, ranges: dict[str, Range] | None = None) -> None:
        """`ranges`: what is known of integer parameters."""
        self._ranges = dict(ranges or {})
        self._operations: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._statements: dict[Statement, str] = {}
        self._by_value: dict[str, Statement] = {}
        self._tables: dict[tuple[str, str], str] = {}

    def emit(self, c_type: str, template: str, *operands: str) -> str:
        """The value of an expression; `template` has {0}, {1}, ... for the operands."""
        statement = Statement(c_type, template, operands)
        value = self._statements.setdefault(statement, f"%{len(self._statements)}")
        self._by_value[value] = statement
        return value

    def range_of(self, value: str, dtype: str) -> Range:
        """Which numbers a value of integers can be."""
        return of_literal(value) or self._ranges.get(value) or whole(dtype)

    def learn(self, value: str, found: Range, name: str = "", operands: Sequence[str] = ()) -> str:
        """The value, an integer, of which that is known now; also of which operation it is."""
        self._ranges[value] = found
        self._operations[value] = name, tuple(operands)
        return value

    def operation(self, value: str) -> tuple[str, tuple[str, ...]]:
        """Name and operands of what makes an integer, as far as learn() was told."""
        return self._operations.get(value, ("", ()))

    def table(self, values: np.ndarray, dtype: str) -> str:
        """The name of a constant array."""
        values = values.ravel()
        if dtype in NARROW_FLOATS:
            values, dtype = values.view(np.uint16), "uint16"
        elif dtype == "bool":
            values, dtype = values.astype(np.uint8), "uint8"
        numbers = ", ".join(literal(x, dtype) for x in values)
        return self._tables.setdefault((TYPES[dtype], numbers), f"jfa_table_{len(self._tables)}")

    def expression(self, value: str) -> tuple[str, tuple[str, ...]]:
        """Template and operands of what makes a value; an empty one for parameters and literals."""
        statement = self._by_value.get(value, Statement("", "", ()))
        return statement.template, statement.operands

    def depends_on(self, value: str, parameter: str) -> bool:
        """Whether a value is made from a parameter."""
        return parameter in self._needed([value])

    def _needed(self, values: Sequence[str]) -> set[str]:
        needed, ahead = set(), list(values)
        while ahead:
            value = ahead.pop()
            if value not in needed:
                needed.add(value)
                if value in self._by_value:
                    ahead += self._by_value[value].operands
        return needed

    def function(
        self, name: str, result: str, parameters: dict[str, str], values: Sequence[str]
    ) -> str:
        """The text of a function of the parameters, by name their types, that returns values."""
        needed = self._needed(values)
        names: dict[str, str] = {}
        lines = []
        for value, statement in self._by_value.items():
            if value in needed:
                operands = (names.get(x, x) for x in statement.operands)
                names[value] = f"v{len(names)}"
                expression = statement.template.format(*operands)
                lines.append(f"  const {statement.type} {names[value]} = {expression};\n")
        returned = ", ".join(names.get(x, x) for x in values)
        returned = returned if len(values) == 1 else f"{{{returned}}}"
        body = "".join([*lines, f"  return {returned};\n"])
        declared = ", ".join(
            f"{c_type} {x}" if re.search(rf"\b{x}\b", body) else c_type
            for x, c_type in parameters.items()
        )
        return f"JFA_FUNCTION {result} {name}(\n    {declared}) {{\n{body}}}\n"

    def text(self, functions: Sequence[str]) -> str:
        """A source file: the functions and what they call and read."""
        body = "\n".join(functions)
        tables = "".join(
            f"JFA_TABLE {c_type} {name}[] = {{{numbers}}};\n"
            for (c_type, numbers), name in self._tables.items()
            if re.search(rf"\b{name}\b", body)
        )
        called: set[str] = set()
        ahead = [body, tables]
        while ahead:
            found = set(re.findall(r"\bjfa_\w+", ahead.pop())) & set(HELPERS) - called
            called |= found
            ahead += [HELPERS[name] for name in found]
        helpers = [text for name, text in HELPERS.items() if name in called]
        return "\n".join([PREAMBLE, *helpers, *([tables] if tables else []), *functions])
