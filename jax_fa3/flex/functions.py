"""Score and mask functions of scalars: traced once for each call, and then values.

A function becomes a jaxpr. What the jaxpr says decides whether two functions are equal, so that a
new lambda in each call finds the program that is compiled. Arrays that a function closes over
become further captured arrays: they are operands of the call, and no part of what is compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util
from jax.sharding import AbstractMesh, AxisType

from jax_fa3.varying import vary_together

NONE, PARTIAL, FULL = 0, 1, 3  # bits of a block: some pair is seen, every pair is

NO_MESH = AbstractMesh((), ())
VARYING = ("pvary", "pcast")  # what makes an array vary over axes of jax.shard_map

INDEX = jax.ShapeDtypeStruct((), jnp.int32)
PAIR = dict.fromkeys(("batch", "head", "q_idx", "kv_idx"), INDEX)
SCORED_PAIR = dict(score=jax.ShapeDtypeStruct((), jnp.float32)) | PAIR


@dataclasses.dataclass(frozen=True)
class ScalarFunction:
    """A traced function of scalars and captured arrays.

    Called with its scalars and all captured arrays of the call, of which it takes the first
    `num_given`, as its user passes them, and those it closed over, from `first_closed_over` on.
    """

    key: Hashable  # of the jaxpr: equal for equal computations
    num_scalars: int
    num_given: int
    first_closed_over: int
    jaxpr: core.Jaxpr = dataclasses.field(compare=False, repr=False)  # without constants

    def __call__(self, *x: Any) -> jax.Array:
        scalars, captured = x[: self.num_scalars], x[self.num_scalars :]
        given = *scalars, *captured[: self.num_given]
        closed_over = captured[self.first_closed_over :][: len(self.jaxpr.invars) - len(given)]
        (result,) = _evaluate(self.jaxpr, (), (*given, *closed_over))
        return result


@dataclasses.dataclass(frozen=True)
class Functions:
    """What a call changes its scores with, and hides pairs of rows and keys with."""

    score: ScalarFunction | None = None
    mask: ScalarFunction | None = None
    block: tuple[int, int] = (0, 0)  # rows and keys of a block of the block mask, if any

    @property
    def has_blocks(self) -> bool:
        return self.block != (0, 0)

    def changed_scores(
        self,
        scores: jax.Array,
        batch: jax.Array,
        head: jax.Array,
        row: jax.Array,
        column: jax.Array,
        captured: Sequence[jax.Array],
    ) -> jax.Array:
        """The scores [b, h, q, g, k] float32 that `score` makes of such.

        Indices int32: batch [b], head [h, g], row [q], column [k].
        """

        def call(*scalars):
            return self.score(*scalars, *captured)

        for axes in (
            (0, None, None, None, 0),
            (0, None, 0, None, None),
            (0, None, None, 0, None),
            (0, None, 0, None, None),
            (0, 0, None, None, None),
        ):
            call = jax.vmap(call, axes)
        return call(scores, batch, head, row, column)

    def visible(
        self,
        batch: jax.Array,
        head: jax.Array,
        row: jax.Array,
        column: jax.Array,
        captured: Sequence[jax.Array],
        states: jax.Array | None,
    ) -> jax.Array | None:
        """bool [b, h, q, k]: what the mask and its blocks let see; None where there is no mask.

        Indices int32: batch [b], head [h], row [q], column [k]; states: uint8 [b | 1, h | 1, blocks
        of rows, blocks of keys], or None. Blocks that are whole do not ask the mask.
        """
        if self.mask is None:
            return None
        seen = over_pairs(self.mask, captured)(batch, head, row, column)
        if states is None:
            return seen
        rows, keys = self.block
        states = jnp.take(states, row // rows, axis=2, mode="clip")
        states = jnp.take(states, column // keys, axis=3, mode="clip")
        return (states == FULL) | ((states == PARTIAL) & seen)


def over_pairs(mask: ScalarFunction, captured: Sequence[jax.Array]) -> Callable[..., jax.Array]:
    """`mask` as a function of batch [b], head [h], row [q], column [k]; gives bool [b, h, q, k]."""

    def call(*scalars):
        return mask(*scalars, *captured)

    for axis in reversed(range(4)):
        call = jax.vmap(call, [0 if i == axis else None for i in range(4)])
    return call


def trace(
    name: str, function: Any, captured: Any, num_before: int
) -> tuple[ScalarFunction, list[jax.Array]]:
    """The public function `name`, score_mod or mask_mod, and the arrays that it closes over, which
    are to stand behind `num_before` others among the captured arrays of the call."""
    if not callable(function):
        raise TypeError(f"{name} is {function!r}; expected a function or None")
    scalars = SCORED_PAIR if name == "score_mod" else PAIR
    leaves, tree = jax.tree.flatten(captured)

    def flat(*x):
        return function(*x[: len(scalars)], *tree.unflatten(x[len(scalars) :]))

    types = *scalars.values(), *map(_type_of, leaves)
    with _whole_arrays():
        found = jax.make_jaxpr(flat)(*types)
    _check_result(name, found.out_avals, "float32" if name == "score_mod" else "bool")
    consts = [*map(jnp.asarray, found.consts)]

    def of_captured(*x):
        return _evaluate(found.jaxpr, x[len(types) :], x[: len(types)])

    # Once more with its constants as arguments, so that nothing holds them but the call.
    with jax.sharding.use_abstract_mesh(NO_MESH):
        jaxpr = jax.make_jaxpr(of_captured)(*types, *map(_type_of, consts)).jaxpr
    return ScalarFunction(_key_of(jaxpr), len(scalars), len(leaves), num_before, jaxpr), consts


def _type_of(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _whole_arrays() -> contextlib.AbstractContextManager[Any]:
    """Where arrays that a function closes over are indexed as if they were on one device. Inside of
    jax.shard_map they are, and JAX wants to know of its axes."""
    kinds = jax.sharding.get_abstract_mesh().axis_types
    if AxisType.Manual in kinds:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(NO_MESH)


def _check_result(name: str, types: Sequence[Any], dtype: str) -> None:
    expected = f"expected one scalar, shape (), of dtype {dtype}"
    if len(types) != 1:
        raise TypeError(f"{name} returns {len(types)} arrays; {expected}")
    (result,) = types
    if result.shape != ():
        raise ValueError(f"{name} returns an array of shape {result.shape}; {expected}")
    if result.dtype != dtype:
        raise TypeError(f"{name} returns a scalar of dtype {result.dtype}; {expected}")


def _evaluate(
    jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], caller: Any = None
) -> list[Any]:
    """The results of a jaxpr that was traced outside of jax.shard_map, wherever it is evaluated:
    what JAX's own evaluation does, and inside of jax.shard_map constants vary with the rest.
    Equations keep the user's lines; those of a function that another one calls have that of the
    call, `caller`, because JAX traces its own functions once for all who call them."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

    def read(atom):
        if isinstance(atom, core.Literal):
            return jnp.asarray(atom.val, atom.aval.dtype)
        return values[atom]

    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        line = caller or equation.source_info.traceback
        if equation.primitive.name == "jit":
            inner = equation.params["jaxpr"]
            results = _evaluate(inner.jaxpr, inner.consts, given, line)
        elif equation.primitive.name in VARYING:
            results = given
        else:
            params = equation.primitive.get_bind_params(equation.params)
            with source_info_util.user_context(line):
                results = equation.primitive.bind(*vary_together(given), **params)
            results = results if equation.primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _key_of(jaxpr: core.Jaxpr) -> Hashable:
    """What a jaxpr computes, as a value: equations with numbers in place of variables. Python
    functions in it, as of a derivative rule, are equal only to themselves."""
    number: dict[Any, int] = {}

    def declared(variables):
        for x in variables:
            number[x] = len(number)
        return tuple(x.aval for x in variables)

    def atom(x):
        return (x.aval, _constant(x.val)) if isinstance(x, core.Literal) else number[x]

    given = declared(jaxpr.constvars), declared(jaxpr.invars)
    equations = tuple(
        (
            equation.primitive,
            tuple((name, _value(x)) for name, x in sorted(equation.params.items())),
            tuple(map(atom, equation.invars)),
            declared(equation.outvars),
        )
        for equation in jaxpr.eqns
    )
    return given, equations, tuple(map(atom, jaxpr.outvars))


def _value(x: Any) -> Hashable:
    """A parameter of an equation as a value."""
    if isinstance(x, core.ClosedJaxpr):
        return _key_of(x.jaxpr), tuple(map(_constant, x.consts))
    if isinstance(x, core.Jaxpr):
        return _key_of(x)
    if isinstance(x, (tuple, list)):
        return type(x).__name__, *map(_value, x)
    if isinstance(x, dict):
        return tuple((name, _value(y)) for name, y in sorted(x.items()))
    if isinstance(x, (np.ndarray, jax.Array)):
        return _constant(x)
    return x if isinstance(x, Hashable) else _Itself(x)


def _constant(x: Any) -> Hashable:
    x = np.asarray(x)
    return str(x.dtype), x.shape, x.tobytes()


class _Itself:
    """A parameter without a value of its own, kept alive and equal to itself."""

    def __init__(self, x: Any):
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.x is other.x

    def __hash__(self) -> int:
        return id(self.x)
