"""Scalar jaxprs in float64, with a bound on what float32 may make of them.

The rule: a float32 result may differ from float64's by the running error bound of the computation.
Each operation adds the errors of its operands times its derivatives, which are JAX's, and some
units in the last place (`ulps`) of its own result. Where a choice depends on more than float32
tells, a comparison or a rounding of values that are as near as their bounds, the point is undecided
and has no right result.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

ULP = 2.0**-24
EXACT = ("neg", "abs", "max", "min", "clamp", "copy", "sign")
ROUNDED = ("add", "add_any", "sub", "mul", "div", "sqrt", "square")
STEPS = ("floor", "ceil", "round", "sign", "is_finite")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
STEEP = ("div", "log", "log2", "sqrt", "rsqrt", "cbrt", "pow", "integer_pow", "atan2")
MOVES = (
    *("broadcast_in_dim", "concatenate", "dynamic_slice", "gather", "reshape", "rev", "slice"),
    *("squeeze", "stack", "tile", "transpose", "select_n", "iota"),
)


@dataclasses.dataclass
class Number:
    """A value of a jaxpr, floats as float64, and the bound of its error, 0.0 if it is exact."""

    value: Any
    error: Any = 0.0

    @property
    def is_exact(self):
        return isinstance(self.error, float)

    @property
    def ends(self):
        return self.value - self.error, self.value + self.error


def is_float(aval):
    return jnp.issubdtype(aval.dtype, jnp.floating)


class Evaluation:
    """One evaluation under jax.enable_x64, and whether every choice in it was decided."""

    def __init__(self, ulps):
        self.ulps = ulps
        self.decided = jnp.bool_(True)

    def decide(self, condition):
        self.decided = self.decided & jnp.all(condition)

    def number(self, value, aval):
        return Number(jnp.asarray(value, jnp.float64 if is_float(aval) else aval.dtype))

    def __call__(self, jaxpr, consts, numbers):
        values = dict(zip(jaxpr.invars, numbers, strict=True))
        values |= {x: self.number(c, x.aval) for x, c in zip(jaxpr.constvars, consts, strict=True)}

        def read(atom):
            if isinstance(atom, core.Literal):
                return self.number(atom.val, atom.aval)
            return values[atom]

        for equation in jaxpr.eqns:
            results = self.results(equation, [read(x) for x in equation.invars])
            values |= zip(equation.outvars, results, strict=True)
        return [read(x) for x in jaxpr.outvars]

    def results(self, equation, numbers):
        params = equation.params
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if isinstance(inner, core.Jaxpr):
            return self(inner, (), numbers)
        if inner is not None:
            return self(inner.jaxpr, inner.consts, numbers)
        if equation.primitive.name == "cond":
            which, *numbers = numbers
            which = jnp.clip(which.value, 0, len(params["branches"]) - 1).astype(jnp.int32)
            cases = [self(x.jaxpr, x.consts, numbers) for x in params["branches"]]
            return [
                self.moved(functools.partial(lax.select_n, which), x)
                for x in zip(*cases, strict=True)
            ]
        return [self.result(equation, numbers)]

    def moved(self, move, numbers):
        value = move(*(x.value for x in numbers))
        if all(x.is_exact for x in numbers):
            return Number(value)
        errors = (jnp.zeros_like(x.value) if x.is_exact else x.error for x in numbers)
        return Number(value, move(*errors))

    def result(self, equation, numbers):
        name, (out,) = equation.primitive.name, equation.outvars
        bind = functools.partial(equation.primitive.bind, **equation.params)
        floats = [i for i, x in enumerate(equation.invars) if is_float(x.aval)]
        if not floats:
            return self.number(bind(*(x.value for x in numbers)), out.aval)
        if name in MOVES:

            def move(*values):
                moved = [x.value for x in numbers]
                for i, x in zip(floats, values, strict=True):
                    moved[i] = x
                return bind(*moved)

            return self.moved(move, [numbers[i] for i in floats])
        if name in COMPARISONS:
            x, y = numbers
            if not (x.is_exact and y.is_exact):
                # Equal float64s are one value that went two ways, as in the derivative of maximum.
                distance = jnp.abs(x.value - y.value)
                self.decide((distance > x.error + y.error) | (distance == 0))
            return Number(bind(x.value, y.value))
        if name in STEPS or (name == "convert_element_type" and not is_float(out.aval)):
            return self.number(self.agreed(bind, numbers[0]), out.aval)
        if name == "bitcast_convert_type":
            # JAX since 0.11 splits a number by its bits where erf is differentiated. What it makes
            # of the parts does not depend on where they are split.
            return Number(bind(numbers[0].value.astype(jnp.float32)))
        if name == "convert_element_type":
            return self.narrowed(numbers[0], equation.invars[0].aval.dtype, out.aval.dtype)
        return self.rounded(name, bind, numbers, out.aval.dtype)

    def rounded(self, name, bind, numbers, dtype):
        if name == "one_minus_square":  # XLA multiplies two rounded factors
            pair = [Number(jnp.ones_like(numbers[0].value)), *numbers]
            factors = [
                self.rounded("add", lax.add, pair, dtype),
                self.rounded("sub", lax.sub, pair, dtype),
            ]
            return self.rounded("mul", lax.mul, factors, dtype)
        return self.narrowed(self.arithmetic(name, bind, numbers), jnp.float32, dtype)

    def agreed(self, step, number):
        """A step function's value, which is decided if it is the same at both ends."""
        value = step(number.value)
        if not number.is_exact:
            low, high = map(step, number.ends)
            self.decide((low == high) | (number.value != number.value))
        return value

    def arithmetic(self, name, bind, numbers):
        values = [x.value for x in numbers]
        if name == "pow":
            values = [x.astype(jnp.float64) for x in values]
        if name == "rem":
            ratios = [jnp.trunc(x / y) for x in numbers[0].ends for y in numbers[1].ends]
            self.decide(functools.reduce(jnp.logical_and, [r == ratios[0] for r in ratios]))
        value = bind(*values)
        ulps = 0 if name in EXACT else 1 if name in ROUNDED else self.ulps
        error = ulps * ULP * jnp.abs(value) if ulps else 0.0
        for i, x in enumerate(numbers):
            if not x.is_exact:
                if name in STEEP:
                    self.decide((x.error <= 1e-2 * jnp.abs(x.value)) | (x.error == 0))
                slope = jnp.abs(self.slope(name, bind, values, i))
                error = error + jnp.where(x.error == 0, 0, slope * x.error)
        return Number(value, error)

    def slope(self, name, bind, values, i):
        if name in (*EXACT, "add", "add_any", "sub"):
            return 1.0
        if name == "mul":
            return values[1 - i]
        tangents = [jnp.ones_like(x) if i == j else jnp.zeros_like(x) for j, x in enumerate(values)]
        return jax.jvp(bind, values, tangents)[1]

    def narrowed(self, number, old, new):
        """A float in a narrower type, in which it is exact if its ends are the same there."""
        if new == old or jnp.finfo(new).bits > 16:
            return number
        return Number(self.agreed(functools.partial(nearest, jnp.finfo(new)), number))


def nearest(kind, x):
    """The float64 x, rounded to a narrower kind. Not by a conversion there and back, which XLA may
    leave out."""
    least = float(kind.smallest_subnormal)
    subnormal = lax.round(x / least, lax.RoundingMethod.TO_NEAREST_EVEN) * least
    normal = lax.reduce_precision(x, kind.nexp, kind.nmant)
    return jnp.where(jnp.abs(x) < float(kind.tiny), subnormal, normal)


def evaluate(jaxpr, arguments, ulps=4):
    """The float results of a closed jaxpr of scalars and arrays in float64, their bounds, and
    whether the point is decided. To be called under jax.enable_x64; the jaxpr is made without."""
    evaluation = Evaluation(ulps)
    numbers = map(evaluation.number, arguments, jaxpr.in_avals)
    results = evaluation(jaxpr.jaxpr, jaxpr.consts, list(numbers))
    return [(x.value, jnp.asarray(x.error)) for x in results], evaluation.decided
