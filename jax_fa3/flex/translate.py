"""Score and mask functions, written in JAX, as CUDA C text that the kernels are linked with.

A function is traced to a jaxpr of scalars, together with its derivative. An array in it, a captured
one or one made of such, is never made: it is a function of indices that writes the statements for
one element (`Lazy`). So indexing in any number of steps becomes one load, and arithmetic on a whole
table happens for the element that is read.

docs/design/flex.md describes the text and what calls it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util

from jax_fa3.flex.ranges import SMALL, chosen, decided, of_literal, of_operation, whole
from jax_fa3.flex.text import (
    FLOATS,
    INTEGERS,
    MAX_CAPTURED,
    MEMORY_TYPES,
    NARROW_FLOATS,
    TYPES,
    Program,
    literal,
    unsigned,
)

MAX_DIMS = 4  # of a captured array
ROUGH_TANH = 2.0**-11  # a relative error that the hardware's tanh keeps to
MAX_TABLE = 1024  # elements of an array that a function closes over

INDICES = ("batch", "head", "query", "key")
PARAMETERS = {"score": "float"} | dict.fromkeys(INDICES, "int")
CAPTURED_ARRAY = r"captured\.array\[(\d+)\]"
CAPTURED = {"captured": "const JfaCaptured&"}
UNIT = {"unit": "float"}  # of products: 1 / scale
NOTHING = literal(-0.0, "float32")  # x + 0 is not x where x is -0
HUGE = 1e18  # by far less than what a product's unit could make infinite
FINITE = tuple(literal(x, "float32") for x in (-np.finfo("float32").max, np.finfo("float32").max))

RAISED, FROM_SMALL = "jfa_raised({0})", "jfa_from_small({0})"
ADD, SUBTRACT, MULTIPLY, NEGATE = "{0} + {1}", "{0} - {1}", "{0} * {1}", "-{0}"
SELECT = "{0} ? {2} : {1}"

CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
)


class Untranslatable(NotImplementedError):
    """A function has something that has no CUDA C text; the message names it and its line."""


class _Reason(Exception):
    """What is untranslatable, before it is known where it stands."""


@dataclasses.dataclass(frozen=True)
class Translation:
    """A score function and a mask function as CUDA C text.

    Equal functions of captured arrays of equal types give equal text, in every process.
    """

    text: str  # the functions of docs/design/flex.md
    captured: tuple[int, ...]  # the numbers of the captured arrays that they read, in order
    is_additive: bool  # the score is only added to, what is as well added to the product


def translate(
    score_mod: Callable[..., jax.Array] | None,
    mask_mod: Callable[..., jax.Array] | None,
    captured: Any = (),
    most_index: int | None = None,
) -> Translation:
    """The CUDA C text of a score function, its derivative, and a mask function.

    The derivative is JAX's own: forward mode, or reverse mode for functions that have a rule of
    jax.custom_vjp.

    Args:
      score_mod: f(score, batch, head, query, key, *captured), of a float32 and four int32 scalars,
        that returns a float32 scalar; None leaves scores as they are.
      mask_mod: f(batch, head, query, key, *captured) that returns a bool scalar; None: all True.
      captured: a tuple, each item an array, anything with shape and dtype, or a pytree of such:
        arrays of at most 4 dimensions, bool, integers, bfloat16, float16, float32. The functions
        may read 8 of them.
      most_index: if given, no index is negative, and those of query and key are this at most.

    Raises:
      Untranslatable: an operation, dtype or array that has no text.
      TypeError: a function returns something else.
    """
    leaves, tree = jax.tree.flatten(captured)
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    given = jax.tree.unflatten(tree, types)
    ranges = {}
    if most_index is not None:
        _, greatest = whole("int32")
        ranges = {x: (0, most_index if x in ("query", "key") else greatest) for x in INDICES}
    program = Program(ranges)
    arrays = [_captured(program, i, x) for i, x in enumerate(types)]
    float32, int32 = (jax.ShapeDtypeStruct((), x) for x in (jnp.float32, jnp.int32))
    indices = [_scalar(x, "int32") for x in INDICES]

    visible = "true"
    if mask_mod is not None:
        jaxpr = jax.make_jaxpr(mask_mod)(*[int32] * 4, *given)
        _check_result("mask_mod", jaxpr, "bool")
        (visible,) = _values("mask_mod", program, jaxpr, [*indices, *arrays])

    score, slope = "score", literal(1, "float32")
    addend: str | None = NOTHING
    if score_mod is not None:
        inputs = float32, *[int32] * 4, *given
        _check_result("score_mod", jax.make_jaxpr(score_mod)(*inputs), "float32")
        jaxpr = _with_slope(score_mod, inputs)
        arguments = [_scalar("score", "float32"), *indices, *arrays]
        score, slope = _values("score_mod", program, jaxpr, arguments)
        # A score that is only added to may still have another derivative than 1, by stop_gradient
        # or a rule of its own.
        addend = None
        if slope == literal(1, "float32"):
            addend = _in_products(program, _addend(program, score))
    key_slope = _key_slope(program, addend) if addend else None

    pair = PARAMETERS | CAPTURED
    of_head = {name: pair[name] for name in ("batch", "head", *CAPTURED)}
    position = {name: pair[name] for name in (*INDICES, *CAPTURED)}
    functions = [
        program.function("jfa_score", "float", pair, [score]),
        program.function("jfa_score_and_slope", "JfaScore", pair, [score, slope]),
        program.function("jfa_mask", "bool", position, [visible]),
        program.function("jfa_is_additive", "bool", {}, [literal(addend is not None, "bool")]),
        program.function("jfa_addend", "float", UNIT | position, [addend or NOTHING]),
        program.function("jfa_has_key_slope", "bool", {}, [literal(key_slope is not None, "bool")]),
        program.function("jfa_key_slope", "float", UNIT | of_head, [key_slope or NOTHING]),
    ]
    text = program.text(functions)
    read = sorted({int(number) for number in re.findall(CAPTURED_ARRAY, text)})
    if len(read) > MAX_CAPTURED:
        raise Untranslatable(
            f"the functions read {len(read)} captured arrays; at most {MAX_CAPTURED} are possible"
        )
    return Translation(
        text=re.sub(CAPTURED_ARRAY, lambda x: f"captured.array[{read.index(int(x[1]))}]", text),
        captured=tuple(read),
        is_additive=addend is not None,
    )


def _with_slope(score_mod: Callable[..., jax.Array], inputs: Sequence[Any]) -> core.ClosedJaxpr:
    """The jaxpr of (score, slope). Reverse mode is the second choice: it spreads the derivative of
    an element over its array."""

    def forward(score, *rest):
        return jax.jvp(lambda x: score_mod(x, *rest), (score,), (jnp.ones_like(score),))

    jaxpr = jax.make_jaxpr(forward)(*inputs)
    if _has(jaxpr.jaxpr, "custom_lin"):  # what a rule of jax.custom_vjp leaves
        jaxpr = jax.make_jaxpr(jax.value_and_grad(score_mod))(*inputs)
    return jaxpr


def _has(jaxpr: core.Jaxpr, primitive: str) -> bool:
    return any(x.primitive.name == primitive for x in jaxpr.eqns) or any(
        _has(x, primitive) for x in core.subjaxprs(jaxpr)
    )


def _check_result(name: str, jaxpr: core.ClosedJaxpr, dtype: str) -> None:
    found = [(x.shape, str(x.dtype)) for x in jaxpr.out_avals]
    if found != [((), dtype)]:
        text = ", ".join(f"{x}{list(shape)}" for shape, x in found)
        raise TypeError(f"{name} returns {text}; expected one scalar, {dtype}[]")


# ---- values

Index = int | str  # a number that is known, or a value of type int


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array: `element` gives the value at an index, one Index for each dimension.

    Indices are within the array; whoever makes one from a number of the user's clamps it.
    """

    shape: tuple[int, ...]
    dtype: str
    element: Callable[[tuple[Index, ...]], str]


def _scalar(value: str, dtype: str) -> Lazy:
    return Lazy((), dtype, lambda _: value)


def _remembered(array: Lazy) -> Lazy:
    """The same array; its element is written now if it has only one."""
    if math.prod(array.shape) != 1:
        return dataclasses.replace(array, element=functools.cache(array.element))
    value = array.element((0,) * len(array.shape))
    return dataclasses.replace(array, element=lambda _: value)


def _captured(program: Program, number: int, array: jax.ShapeDtypeStruct) -> Lazy:
    dtype = str(array.dtype)
    what = f"captured array {number}, {dtype}{list(array.shape)}"
    if dtype not in TYPES:
        raise Untranslatable(f"{what}: the dtype has no translation; cast it before the call")
    if len(array.shape) > MAX_DIMS:
        raise Untranslatable(f"{what}: at most {MAX_DIMS} dimensions are possible")
    if not math.prod(array.shape):
        raise Untranslatable(f"{what}: it has no elements")
    memory = MEMORY_TYPES.get(dtype, TYPES[dtype])
    pointer = f"((const {memory}*)captured.array[{number}])"
    return _loaded(program, pointer, array.shape, dtype)


def _constant(program: Program, value: Any) -> Lazy:
    """An array that a function closes over."""
    if isinstance(value, jax.core.Tracer):
        raise _Reason("it closes over a traced array; pass the array in `captured`")
    value = np.asarray(value)
    dtype = str(value.dtype)
    if dtype not in TYPES:
        raise _Reason(f"it closes over an array of {dtype}, which has no translation")
    if value.shape == ():
        return _scalar(literal(value, dtype), dtype)
    if not 0 < value.size <= MAX_TABLE:
        raise _Reason(
            f"it closes over an array of shape {value.shape}, of which 1 to {MAX_TABLE} elements "
            "are possible; pass the array in `captured`"
        )
    return _loaded(program, program.table(value, dtype), value.shape, dtype)


def _loaded(program: Program, pointer: str, shape: tuple[int, ...], dtype: str) -> Lazy:
    """An array in memory, row-major, at a C expression."""
    memory = MEMORY_TYPES.get(dtype, TYPES[dtype])

    def element(index):
        offset = _offset(program, index, shape)
        loaded = program.emit(memory, f"{pointer}[{{0}}]", offset)
        if dtype == "bool":
            return program.emit("bool", "{0} != 0", loaded)
        if dtype in NARROW_FLOATS:
            return program.emit("float", f"jfa_load_{dtype}({{0}})", loaded)
        return loaded

    return Lazy(shape, dtype, element)


def _offset(program: Program, index: Sequence[Index], shape: Sequence[int]) -> str:
    """The number of an element in row-major order."""
    is_large = math.prod(shape) > np.iinfo(np.int32).max
    c_type, suffix = ("long long", "ll") if is_large else ("int", "")
    known = 0
    terms: list[str] = []
    operands: list[str] = []
    for i, dim in enumerate(shape):
        stride = math.prod(shape[i + 1 :])
        if dim == 1:
            continue
        place = index[i]
        if isinstance(place, int):
            known += place * stride
        else:
            terms.append(f"{{{len(operands)}}}" + (f" * {stride}{suffix}" if stride != 1 else ""))
            operands.append(place)
    if known or not terms:
        terms.append(f"{known}{suffix}")
    if not operands:
        return terms[0]
    if terms == ["{0}"]:
        return operands[0]
    return program.emit(c_type, " + ".join(terms), *operands)


def _clamped(program: Program, value: str, dtype: str, last: int) -> Index:
    """An index of the user's, moved to the nearest one from 0 to `last`."""
    if last == 0 or value.isdigit():
        return min(int(value), last) if last else 0
    c = TYPES[dtype]
    least, greatest = program.range_of(value, dtype)
    if least >= 0 and dtype == "int32":
        if greatest <= last:
            return value
        clamped = program.emit(c, f"{{0}} < {last} ? {{0}} : {last}", value)
        return program.learn(clamped, (min(least, last), last))
    high = literal(last, dtype) if last <= np.iinfo(dtype).max else None
    text = "{0}" if high is None else f"{{0}} < {high} ? {{0}} : {high}"
    if not dtype.startswith("u"):
        text = f"{{0}} < 0 ? 0 : ({text})" if high else "{0} < 0 ? 0 : {0}"
    clamped = program.emit(c, text, value)
    clamped = clamped if dtype == "int32" else program.emit("int", "(int){0}", clamped)
    return program.learn(clamped, (0, last))


def _plus(program: Program, x: Index, y: Index) -> Index:
    if isinstance(x, int) and isinstance(y, int):
        return x + y
    if x == 0 or y == 0:
        return y if x == 0 else x
    return program.emit("int", "{0} + {1}", str(x), str(y))


def _select(program: Program, c_type: str, which: str, if_false: str, if_true: str) -> str:
    if which in ("true", "false"):
        return if_true if which == "true" else if_false
    return program.emit(c_type, SELECT, which, if_false, if_true)


# ---- jaxprs


def _values(
    name: str, program: Program, jaxpr: core.ClosedJaxpr, arguments: Sequence[Lazy]
) -> list[str]:
    """The results of a jaxpr of scalars, the public function `name`."""
    try:
        results = _interpret(program, jaxpr.jaxpr, jaxpr.consts, arguments, None)
    except _Reason as reason:
        raise Untranslatable(f"{name}: {reason}") from None
    return [x.element(()) for x in results]


def _interpret(
    program: Program,
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    arguments: Sequence[Lazy],
    line: str | None,
) -> list[Lazy]:
    """The results of a jaxpr; line: where a jaxpr stands that another one calls. JAX traces a
    function of its own once and remembers the line of who called it first."""
    values = dict(zip(jaxpr.invars, arguments, strict=True))
    values |= {x: _constant(program, c) for x, c in zip(jaxpr.constvars, consts, strict=True)}

    def read(atom):
        if isinstance(atom, core.Literal):
            return _constant(program, np.asarray(atom.val, atom.aval.dtype))
        return values[atom]

    for equation in _needed(jaxpr):
        here = line or source_info_util.summarize(equation.source_info)
        inputs = [read(x) for x in equation.invars]
        name, params = equation.primitive.name, equation.params
        if name in CALLS:
            inner = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
            results = _interpret(program, *_opened(inner), inputs, here)
        elif name == "cond":
            results = _branches(program, params["branches"], inputs, here)
        else:
            try:
                results = _apply(program, name, params, inputs, [x.aval for x in equation.outvars])
            except _Reason as reason:
                raise _Reason(f"{reason} at {here}") from None
        values |= zip(equation.outvars, map(_remembered, results), strict=True)
    return [read(x) for x in jaxpr.outvars]


def _needed(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """The equations that the results are made with."""
    wanted = {x for x in jaxpr.outvars if not isinstance(x, core.Literal)}
    needed = []
    for equation in reversed(jaxpr.eqns):
        if not wanted.isdisjoint(equation.outvars):
            wanted |= {x for x in equation.invars if not isinstance(x, core.Literal)}
            needed.append(equation)
    return needed[::-1]


def _opened(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> tuple[core.Jaxpr, Sequence[Any]]:
    if isinstance(jaxpr, core.ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def _branches(
    program: Program, branches: Sequence[core.ClosedJaxpr], inputs: Sequence[Lazy], line: str
) -> list[Lazy]:
    """Every branch, which can do no harm, and a choice among the results."""
    which, *inputs = inputs
    results = [_interpret(program, *_opened(x), inputs, line) for x in branches]
    return [
        _elementwise(program, _choice(program, which.dtype, x[0].dtype), x[0], which, *x)
        for x in zip(*results, strict=True)
    ]


def _apply(
    program: Program,
    name: str,
    params: dict[str, Any],
    inputs: Sequence[Lazy],
    types: Sequence[Any],
) -> list[Lazy]:
    """The results of a primitive that is not a call; types: theirs."""
    for x in types:
        if str(x.dtype) not in TYPES:
            raise _Reason(f"the primitive {name} makes {x.dtype}, which has no translation,")
    if name in SAME:
        return list(inputs)
    outs = [Lazy(x.shape, str(x.dtype), lambda _: "") for x in types]
    if name in STRUCTURE:
        return [STRUCTURE[name](program, outs[0], params, *inputs)]
    if name in PARTS:
        return PARTS[name](program, outs, params, *inputs)
    write = _writer(program, name, params, [x.dtype for x in inputs], outs[0].dtype)
    if write is None:
        dtypes = ", ".join(x.dtype for x in inputs)
        raise _Reason(f"the primitive {name} of ({dtypes}) has no translation,")
    return [_elementwise(program, write, outs[0], *inputs)]


def _elementwise(program: Program, write: Callable[..., str], like: Lazy, *inputs: Lazy) -> Lazy:
    """An array of the shape and dtype of `like`; scalars among the inputs broadcast."""

    def element(index):
        return write(
            *(
                x.element(tuple(0 if n == 1 else i for n, i in zip(x.shape, index, strict=False)))
                for x in inputs
            )
        )

    return dataclasses.replace(like, element=element)


# ---- arithmetic: what writes the element of a result, of those of its operands

FLOAT_TEMPLATES = {
    "add": ADD,
    "add_any": ADD,
    "sub": SUBTRACT,
    "mul": MULTIPLY,
    "div": "{0} / {1}",
    "rem": "fmodf({0}, {1})",
    "neg": NEGATE,
    "abs": "fabsf({0})",
    "sign": "jfa_sign({0})",
    "min": "jfa_min({0}, {1})",
    "max": "jfa_max({0}, {1})",
    "clamp": "jfa_min(jfa_max({1}, {0}), {2})",
    "pow": "powf({0}, {1})",
    "square": "{0} * {0}",
    "logistic": "jfa_logistic({0})",
    "rsqrt": "jfa_rsqrt({0})",
    "tanh": "jfa_tanh({0})",
    "rough_tanh": "jfa_rough_tanh({0})",
    "atan2": "atan2f({0}, {1})",
} | {
    name: f"{name}f({{0}})"
    for name in (
        *("exp", "exp2", "expm1", "log", "log1p", "log2", "sqrt", "cbrt"),
        *("floor", "ceil", "erf", "erfc"),
        *("sin", "cos", "tan", "asin", "acos", "atan"),
        *("sinh", "cosh", "asinh", "acosh", "atanh"),
    )
}
# Results that a narrow float can hold if it can hold the operands.
EXACT = ("neg", "abs", "sign", "min", "max", "clamp", "floor", "ceil")

# c: the type, u: the one in which it wraps around, own: its dtype's name.
INTEGER_TEMPLATES = {
    "add": "({c})(({u}){0} + ({u}){1})",
    "sub": "({c})(({u}){0} - ({u}){1})",
    "mul": "({c})(({u}){0} * ({u}){1})",
    "square": "({c})(({u}){0} * ({u}){0})",
    "neg": "({c})(0 - ({u}){0})",
    "div": "jfa_divide_{own}({0}, {1})",
    "rem": "jfa_remainder_{own}({0}, {1})",
    "min": "{0} < {1} ? {0} : {1}",
    "max": "{0} < {1} ? {1} : {0}",
    "clamp": "{1} < {0} ? ({0} < {2} ? {0} : {2}) : {1} < {2} ? {1} : {2}",
    "and": "({c})({0} & {1})",
    "or": "({c})({0} | {1})",
    "xor": "({c})({0} ^ {1})",
    "not": "({c})~{0}",
    "shift_left": "jfa_shift_left_{own}({0}, {1})",
    "shift_right_logical": "jfa_shift_right_logical_{own}({0}, {1})",
    "shift_right_arithmetic": "jfa_shift_right_arithmetic_{own}({0}, {1})",
    "population_count": "({c})jfa_population_count(({bits}){0})",
    "clz": "({c})(jfa_leading_zeros(({bits}){0}) - {unused})",
}
SIGNED_TEMPLATES = INTEGER_TEMPLATES | {
    "abs": "{0} < 0 ? ({c})(0 - ({u}){0}) : {0}",
    "sign": "({c})(({0} > 0) - ({0} < 0))",
}
UNSIGNED_TEMPLATES = INTEGER_TEMPLATES | {"sign": "({c})({0} != 0)"}

BOOL_TEMPLATES = {
    "and": "{0} && {1}",
    "or": "{0} || {1}",
    "xor": "({0} ^ {1}) != 0",
    "not": "!{0}",
    "min": "{0} && {1}",
    "max": "{0} || {1}",
}

COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def _writer(
    program: Program, name: str, params: dict[str, Any], dtypes: Sequence[str], dtype: str
) -> Callable[..., str] | None:
    """Makes the element of a result from those of the operands of a primitive; None: unknown."""
    first = dtypes[0] if dtypes else ""
    if name in COMPARISONS:
        return functools.partial(_compared, program, name, first)
    if name == "is_finite":
        return functools.partial(program.emit, "bool", "fabsf({0}) < JFA_INFINITY")
    if name == "select_n":
        return _choice(program, first, dtype)
    if name == "convert_element_type":
        return lambda x: _converted(program, x, first, dtype)
    if name == "bitcast_convert_type":
        return _bitcast(program, first, dtype)
    if name == "tanh" and _tolerance(params) >= ROUGH_TANH:
        return functools.partial(_operation, program, "rough_tanh", dtype)
    if name == "integer_pow":
        return lambda x: _integer_power(program, x, params["y"], dtype)
    if name == "one_minus_square":
        return lambda x: _one_minus_square(program, x, dtype)
    if name == "polynomial":
        return functools.partial(_polynomial, program, dtype)
    if name == "pow" and dtypes[1] != first:
        return lambda x, y: _operation(
            program, "pow", dtype, x, _converted(program, y, dtypes[1], dtype)
        )
    if name == "round":
        is_even = params["rounding_method"] == jax.lax.RoundingMethod.TO_NEAREST_EVEN
        return functools.partial(program.emit, "float", "rintf({0})" if is_even else "roundf({0})")
    if name not in _templates(dtype):
        return None
    return functools.partial(_operation, program, name, dtype)


def _tolerance(params: dict[str, Any]) -> float:
    """The relative error that the user of a primitive accepts; 0 where nothing is said."""
    return getattr(params.get("accuracy"), "rtol", 0.0)


def _templates(dtype: str) -> dict[str, str]:
    if dtype in FLOATS:
        return FLOAT_TEMPLATES
    if dtype == "bool":
        return BOOL_TEMPLATES
    return UNSIGNED_TEMPLATES if dtype.startswith("u") else SIGNED_TEMPLATES


def _operation(program: Program, name: str, dtype: str, *operands: str) -> str:
    """An operation on operands of its own dtype."""
    template = _templates(dtype)[name]
    if name in ("min", "max") and operands[0] == operands[1]:
        return operands[0]
    ranges = [program.range_of(x, dtype) for x in operands] if dtype in INTEGERS else []
    if ranges and name in ("min", "max"):
        which = chosen(name, *ranges)
        if which is not None:
            return operands[which]
    if ranges and name == "abs" and ranges[0][0] >= 0:
        return operands[0]
    if dtype in INTEGERS:
        width = np.iinfo(dtype).bits
        words = {
            "{c}": TYPES[dtype],
            "{u}": unsigned(dtype),
            "{own}": dtype,
            "{bits}": TYPES[f"uint{width}"],
            "{unused}": str(64 - width),
        }
        for word, text in words.items():
            template = template.replace(word, text)
    value = program.emit(TYPES[dtype], template, *operands)
    if ranges:
        return program.learn(value, of_operation(name, dtype, *ranges), name, operands)
    return value if name in EXACT else _rounded(program, value, dtype)


def _compared(program: Program, name: str, dtype: str, x: str, y: str) -> str:
    if x == y and dtype not in FLOATS:  # of which compilers warn
        return literal(name in ("eq", "le", "ge"), "bool")
    if dtype in INTEGERS:
        known = decided(name, program.range_of(x, dtype), program.range_of(y, dtype))
        if known is not None:
            return literal(known, "bool")
    return program.emit("bool", f"{{0}} {COMPARISONS[name]} {{1}}", x, y)


def _rounded(program: Program, value: str, dtype: str) -> str:
    """A float as a float that a narrower type holds too."""
    if dtype not in NARROW_FLOATS:
        return value
    return program.emit("float", f"jfa_round_{dtype}({{0}})", value)


def _converted(program: Program, value: str, old: str, new: str) -> str:
    """A number in another dtype, as XLA converts it."""
    c_type = TYPES[new]
    if old == new:
        return value
    if new == "bool":
        return program.emit("bool", "{0} != 0", value)
    if old in FLOATS and new in FLOATS:
        return _rounded(program, value, new)
    if old in FLOATS:
        return program.emit(c_type, f"jfa_to_{new}({{0}})", value)
    if new in FLOATS and old == "int32" and _is_small(program, value):
        return _rounded(program, _small_as_float(program, value), new)
    least, greatest = program.range_of(value, old) if old in INTEGERS else (0, 1)
    converted = program.emit(c_type, f"({c_type}){{0}}", value)
    if new not in INTEGERS:
        return _rounded(program, converted, new)
    fits = whole(new)[0] <= least and greatest <= whole(new)[1]
    return program.learn(converted, (least, greatest)) if fits else converted


PARTS_OF_SMALL = ("add", "sub", "mul", "neg", "abs")


def _is_made_of_small(program: Program, value: str) -> bool:
    """Whether the float of a small int32 may be computed from the floats of its operands. A float
    product with a negative operand would be -0 where the integer is 0."""
    name, operands = program.operation(value)
    if name not in PARTS_OF_SMALL or not all(_is_small(program, x) for x in operands):
        return False
    return name != "mul" or all(program.range_of(x, "int32")[0] >= 0 for x in operands)


def _is_small(program: Program, value: str) -> bool:
    least, greatest = program.range_of(value, "int32")
    return -SMALL < least and greatest < SMALL


def _small_as_float(program: Program, value: str) -> str:
    """A small int32 as a float, made of the floats of what it is made of, which is exact: a kernel
    then casts each row and each key, and not each pair."""
    if _is_made_of_small(program, value):
        name, operands = program.operation(value)
        if name == "sub" and not any(_has_parts(program, x) for x in operands):
            raised = (program.emit("float", RAISED, x) for x in operands)
            return program.emit("float", SUBTRACT, *raised)
        floats = [_small_as_float(program, x) for x in operands]
        if name == "neg":  # of 0 it is 0
            name, floats = "sub", [literal(0, "float32"), *floats]
        return _operation(program, name, "float32", *floats)
    number = of_literal(value)
    if number is not None:
        return literal(number[0], "float32")
    return program.emit("float", FROM_SMALL, value)


def _has_parts(program: Program, value: str) -> bool:
    """Whether a small integer is a number, or made of others that are cast in its place."""
    return _is_made_of_small(program, value) or of_literal(value) is not None


def _bitcast(program: Program, old: str, new: str) -> Callable[..., str] | None:
    if old == new:
        return lambda x: x
    if old == "float32" and new in ("int32", "uint32"):
        return functools.partial(program.emit, TYPES[new], f"({TYPES[new]})jfa_bits({{0}})")
    if new == "float32" and old in ("int32", "uint32"):
        return functools.partial(program.emit, "float", "jfa_float((unsigned){0})")
    if {old, new} <= {*INTEGERS} and np.iinfo(old).bits == np.iinfo(new).bits:
        return functools.partial(program.emit, TYPES[new], f"({TYPES[new]}){{0}}")
    return None


def _integer_power(program: Program, x: str, power: int, dtype: str) -> str:
    """By squaring, as JAX does it."""
    result, ahead = None, abs(power)
    while ahead:
        if ahead & 1:
            result = x if result is None else _operation(program, "mul", dtype, result, x)
        ahead >>= 1
        if ahead:
            x = _operation(program, "mul", dtype, x, x)
    one = literal(1, dtype)
    result = one if result is None else result
    return _operation(program, "div", dtype, one, result) if power < 0 else result


def _one_minus_square(program: Program, x: str, dtype: str) -> str:
    """Accurate near 1 and -1."""
    one = literal(1, dtype)
    factors = (_operation(program, name, dtype, one, x) for name in ("add", "sub"))
    return _operation(program, "mul", dtype, *factors)


def _polynomial(program: Program, dtype: str, x: str, *coefficients: str) -> str:
    """By Horner's rule; the constant term comes first."""
    *others, result = coefficients
    for coefficient in reversed(others):
        product = _operation(program, "mul", dtype, result, x)
        result = _operation(program, "add", dtype, product, coefficient)
    return result


def _choice(program: Program, which_dtype: str, dtype: str) -> Callable[..., str]:
    """Chooses by a bool, or by an integer that is moved to the nearest case."""

    def select(which, if_false, if_true):
        chosen = _select(program, TYPES[dtype], which, if_false, if_true)
        if dtype not in INTEGERS or chosen in (if_false, if_true):
            return chosen
        ranges = zip(*(program.range_of(x, dtype) for x in (if_false, if_true)), strict=True)
        (least, greatest) = ranges
        return program.learn(chosen, (min(least), max(greatest)))

    def choose(which, *cases):
        if which_dtype == "bool":
            return select(which, *cases) if len(cases) > 1 else cases[0]
        *cases, result = cases
        for number, case in reversed([*enumerate(cases, 1)]):
            is_later = _compared(program, "ge", which_dtype, which, literal(number, which_dtype))
            result = select(is_later, case, result)
        return result

    return choose


# ---- structure: which element of the operands is an element of the result


def _broadcast_in_dim(program, out, params, operand, *dynamic):
    dims = params["broadcast_dimensions"]

    def element(index):
        return operand.element(
            tuple(0 if n == 1 else index[d] for n, d in zip(operand.shape, dims, strict=True))
        )

    return dataclasses.replace(out, element=element)


def _reshape(program, out, params, operand):
    if math.prod(out.shape) > np.iinfo(np.int32).max:
        raise _Reason("a reshape of more than 2^31 - 1 elements has no translation,")
    kept = [i for i, n in enumerate(out.shape) if n != 1]
    only_ones = [out.shape[i] for i in kept] == [n for n in operand.shape if n != 1]

    def element(index):
        if only_ones:
            ahead = (index[i] for i in kept)
            return operand.element(tuple(0 if n == 1 else next(ahead) for n in operand.shape))
        number = _offset(program, index, out.shape)
        old = []
        for i, n in enumerate(operand.shape):
            stride = math.prod(operand.shape[i + 1 :])
            part = program.emit("int", f"{{0}} / {stride}", number) if stride != 1 else number
            old.append(program.emit("int", f"{{0}} % {n}", part) if i else part)
        return operand.element(tuple(old))

    return dataclasses.replace(out, element=element)


def _transpose(program, out, params, operand):
    def element(index):
        old = dict(zip(params["permutation"], index, strict=True))
        return operand.element(tuple(old[i] for i in range(len(index))))

    return dataclasses.replace(out, element=element)


def _reversed(program, out, params, operand):
    def element(index):
        return operand.element(
            tuple(
                _minus(program, out.shape[i] - 1, x) if i in params["dimensions"] else x
                for i, x in enumerate(index)
            )
        )

    return dataclasses.replace(out, element=element)


def _minus(program: Program, x: int, y: Index) -> Index:
    return x - y if isinstance(y, int) else program.emit("int", f"{x} - {{0}}", y)


def _slice(program, out, params, operand):
    strides = params["strides"] or (1,) * len(out.shape)

    def element(index):
        return operand.element(
            tuple(
                _plus(program, start, _times(program, x, stride))
                for start, x, stride in zip(params["start_indices"], index, strides, strict=True)
            )
        )

    return dataclasses.replace(out, element=element)


def _times(program: Program, x: Index, y: int) -> Index:
    if isinstance(x, int) or y == 1:
        return x if y == 1 else x * y
    return program.emit("int", f"{{0}} * {y}", x)


def _iota(program, out, params, *dynamic):
    def element(index):
        value = index[params["dimension"]]
        if isinstance(value, int):
            return literal(value, out.dtype)
        return _converted(program, value, "int32", out.dtype)

    return dataclasses.replace(out, element=element)


def _concatenate(program, out, params, *operands):
    dim = params["dimension"]

    def element(index):
        at = index[dim]
        parts, begin = [], 0
        for x in operands:
            end = begin + x.shape[dim]
            if isinstance(at, int):
                own = at - begin if begin <= at < end else None
            else:
                own = _clamped(program, _plus(program, at, -begin), "int32", x.shape[dim] - 1)
            if own is not None:
                parts.append((end, x.element((*index[:dim], own, *index[dim + 1 :]))))
            begin = end
        *parts, (_, value) = parts
        for end, part in reversed(parts):
            is_before = program.emit("bool", f"{{0}} < {end}", at)
            value = _select(program, TYPES[out.dtype], is_before, value, part)
        return value

    return dataclasses.replace(out, element=element)


def _stack(program, out, params, *operands):
    dim = params["axis"]

    def expanded(operand):
        shape = (*operand.shape[:dim], 1, *operand.shape[dim:])
        return Lazy(shape, out.dtype, lambda x: operand.element((*x[:dim], *x[dim + 1 :])))

    return _concatenate(program, out, {"dimension": dim}, *map(expanded, operands))


def _unstack(program, outs, params, operand):
    dim = params["axis"]

    def part(i):
        return lambda x: operand.element((*x[:dim], i, *x[dim:]))

    return [dataclasses.replace(out, element=part(i)) for i, out in enumerate(outs)]


def _split(program, outs, params, operand):
    dim = params["axis"]

    def part(start):
        return lambda x: operand.element((*x[:dim], _plus(program, x[dim], start), *x[dim + 1 :]))

    starts = np.cumsum([0, *params["sizes"]]).tolist()
    return [dataclasses.replace(out, element=part(n)) for out, n in zip(outs, starts, strict=False)]


def _tile(program, out, params, operand):
    def element(index):
        index = index[len(out.shape) - len(operand.shape) :]
        return operand.element(
            tuple(
                x % n if isinstance(x, int) else program.emit("int", f"{{0}} % {n}", x)
                for x, n in zip(index, operand.shape, strict=True)
            )
        )

    return dataclasses.replace(out, element=element)


def _dynamic_slice(program, out, params, operand, *starts):
    lasts = [n - size for n, size in zip(operand.shape, params["slice_sizes"], strict=True)]
    first = [
        _clamped(program, x.element(()), x.dtype, last)
        for x, last in zip(starts, lasts, strict=True)
    ]

    def element(index):
        return operand.element(
            tuple(_plus(program, x, y) for x, y in zip(first, index, strict=True))
        )

    return dataclasses.replace(out, element=element)


def _gather(program, out, params, operand, indices):
    """Every mode clamps: XLA does so too where it is promised that it need not. Only in "fill" does
    an index that is not within the array decide the value."""
    dims, sizes = params["dimension_numbers"], params["slice_sizes"]
    gone = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
    offset_of = dict(
        zip((d for d in range(len(sizes)) if d not in gone), dims.offset_dims, strict=True)
    )
    is_fill = params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    fill = literal(_fill_value(operand.dtype, params["fill_value"]), operand.dtype)

    def element(index):
        batch = tuple(x for i, x in enumerate(index) if i not in dims.offset_dims)
        start: dict[int, Index] = {}
        inside = []
        for k, d in enumerate(dims.start_index_map):
            value, last = indices.element((*batch, k)), operand.shape[d] - sizes[d]
            start[d] = _clamped(program, value, indices.dtype, last)
            if is_fill:
                inside.append(_is_within(program, value, indices.dtype, last))
        for d, b in zip(dims.operand_batching_dims, dims.start_indices_batching_dims, strict=True):
            start[d] = batch[b]
        value = operand.element(
            tuple(
                _plus(program, start.get(d, 0), index[offset_of[d]] if d in offset_of else 0)
                for d in range(len(sizes))
            )
        )
        for x in inside:
            value = _select(program, TYPES[out.dtype], x, fill, value)
        return value

    return dataclasses.replace(out, element=element)


def _is_within(program: Program, value: str, dtype: str, last: int) -> str:
    least, greatest = program.range_of(value, dtype)
    if 0 <= least and greatest <= last:
        return literal(True, "bool")
    text = f"{{0}} <= {literal(last, dtype)}" if last <= np.iinfo(dtype).max else "true"
    if not dtype.startswith("u"):
        text = f"{{0}} >= 0 && {text}"
    return program.emit("bool", text, value)


def _fill_value(dtype: str, value: Any) -> Any:
    if value is not None:
        return value
    if dtype in FLOATS:
        return math.nan
    if dtype == "bool":
        return True
    info = np.iinfo(dtype)
    return info.min or info.max


STRUCTURE: dict[str, Callable[..., Lazy]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "iota": _iota,
    "reshape": _reshape,
    "rev": _reversed,
    "slice": _slice,
    "squeeze": _reshape,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
}
PARTS: dict[str, Callable[..., list[Lazy]]] = {"split": _split, "unstack": _unstack}
SAME = ("copy", "copy_p", "optimization_barrier", "pcast", "pvary", "stop_gradient")


# ---- additive functions


def _addend(program: Program, value: str) -> str | None:
    """What is added to the score to make a value, or None if it is not made by additions alone."""
    if value == "score":
        return NOTHING
    if not program.depends_on(value, "score"):
        return None
    template, operands = program.expression(value)
    touched = [x for x in operands if program.depends_on(x, "score")]
    if len(touched) != 1 or operands.count(touched[0]) != 1:
        return None
    (carrier,) = touched
    if template != ADD and (template != SUBTRACT or carrier != operands[0]):
        return None
    inner = _addend(program, carrier)
    if inner is None:
        return None
    other = operands[1] if carrier == operands[0] else operands[0]
    if inner != NOTHING:
        return program.emit("float", template, inner, other)
    return other if template == ADD else program.emit("float", NEGATE, other)


def _in_products(program: Program, value: str | None) -> str | None:
    """A value in units of the product, or None where that would cost an operation for each pair:
    what is multiplied by `unit` must be the same for all pairs of a head."""
    if value is None or value == NOTHING:
        return value
    if _is_uniform(program, value):
        return _uniform_in_products(program, value)
    template, operands = program.expression(value)
    if template == MULTIPLY:
        first, second = operands
        if _is_uniform(program, second):
            first, second = second, first
        if not _is_uniform(program, first):
            return None
        factor = _uniform_in_products(program, first)
        return factor and program.emit("float", MULTIPLY, factor, second)
    if template not in (ADD, SUBTRACT, NEGATE):
        return None
    terms = [x for x in (_in_products(program, x) for x in operands) if x is not None]
    return program.emit("float", template, *terms) if len(terms) == len(operands) else None


def _key_slope(program: Program, value: str) -> str | None:
    """By how much an addend grows from key to key, the same for all pairs of a head; None where it
    does not depend on the key, or is no linear function of its index."""
    template, operands = program.expression(value)
    depend = [x for x in operands if program.depends_on(x, "key")]
    if not depend:
        return None
    if template in (RAISED, FROM_SMALL):
        number = _integer_slope(program, *operands)
        return literal(number, "float32") if number else None
    if template == MULTIPLY:
        factors = [x for x in operands if _is_uniform(program, x)]
        slope = _key_slope(program, *depend) if len(factors) == 1 else None
        return slope and program.emit("float", MULTIPLY, *factors, slope)
    if template not in (ADD, SUBTRACT, NEGATE):
        return None
    slopes = [x for x in (_key_slope(program, y) for y in depend) if x is not None]
    if len(slopes) < len(depend):
        return None
    if len(slopes) == len(operands):
        return program.emit("float", template, *slopes)
    is_taken_away = template == SUBTRACT and depend == [operands[1]]
    return program.emit("float", NEGATE, *slopes) if is_taken_away else slopes[0]


def _integer_slope(program: Program, value: str) -> int | None:
    """By how much an int32 grows from key to key; None where that is not one number, or where it
    may have wrapped around."""
    if not program.depends_on(value, "key"):
        return 0
    if value == "key":
        return 1
    name, operands = program.operation(value)
    slopes = [x for x in (_integer_slope(program, y) for y in operands) if x is not None]
    if not _is_small(program, value) or len(slopes) < len(operands):
        return None
    if name == "mul":
        for number, slope in zip(map(of_literal, operands), reversed(slopes), strict=True):
            if number is not None:
                return number[0] * slope
    signs = {"add": (1, 1), "sub": (1, -1), "neg": (-1,)}.get(name)
    return sum(x * y for x, y in zip(signs, slopes, strict=True)) if signs else None


def _is_uniform(program: Program, value: str) -> bool:
    return not any(program.depends_on(value, x) for x in ("query", "key"))


def _uniform_in_products(program: Program, value: str) -> str | None:
    """A value that is the same for all pairs, times `unit`. What is finite stays so: times 0 it is
    0. None for numbers in place of -inf, which must stay what they are."""
    number = re.fullmatch(r"\(?(-?[\d.e+-]+)f\)?", value)
    if number and abs(float(number[1])) > HUGE:
        return None
    scaled = program.emit("float", MULTIPLY, value, "unit")
    bounded = program.emit("float", "jfa_min(jfa_max({0}, {1}), {2})", scaled, *FINITE)
    return program.emit("float", "fabsf({0}) <= {2} ? {1} : {0}", value, bounded, FINITE[1])
