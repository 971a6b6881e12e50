"""A linear map whose transpose is given: what gives one function forward and reverse mode.

jax.custom_vjp has no forward mode, and the gradient of a jax.custom_jvp is the transpose that JAX
makes of the code of its tangents. A custom_jvp whose tangents are a linear_map has both modes:
forward mode runs the map, reverse mode its transpose. jax.vmap maps over it, and it can be
differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, unmapped_aval
from jax.interpreters import ad, batching, mlir


def linear_map(
    apply: Callable[[Any, Any], Any],
    transpose: Callable[[Any, Any], Any],
    residuals: Any,
    tangents: Any,
    like: Any,
) -> Any:
    """apply(residuals, tangents), which has the types of `like`. All are pytrees of arrays.

    transpose(residuals, cotangents) has the types of `tangents`; a cotangent that is 0 is None.
    """
    known, tree_of_known = jax.tree.flatten(residuals)
    moving, tree_of_moving = jax.tree.flatten(tangents)
    results, tree_of_results = jax.tree.flatten(like)

    def flat_apply(known, moving):
        given = tree_of_known.unflatten(known), tree_of_moving.unflatten(moving)
        return jax.tree.leaves(apply(*given))

    def flat_transpose(known, cotangents):
        given = tree_of_known.unflatten(known), tree_of_results.unflatten(cotangents)
        return jax.tree.leaves(transpose(*given))

    flat = _linear_map.bind(
        *known,
        *moving,
        apply=flat_apply,
        transpose=flat_transpose,
        num_known=len(known),
        types=tuple(map(jax.typeof, results)),
    )
    return tree_of_results.unflatten(flat)


_linear_map = Primitive("linear_map")
_linear_map.multiple_results = True


def _evaluate(*arrays, apply, num_known, **_):
    return apply(list(arrays[:num_known]), list(arrays[num_known:]))


def _differentiate(primals, tangents, **facts):
    n = facts["num_known"]
    results = _linear_map.bind(*primals, **facts)
    is_known_moved = not all(type(x) is ad.Zero for x in tangents[:n])
    tangents = [*map(ad.instantiate_zeros, tangents)]
    if is_known_moved:
        _, moved = jax.jvp(lambda *x: _evaluate(*x, **facts), list(primals), tangents)
    else:
        moved = _linear_map.bind(*primals[:n], *tangents[n:], **facts)
    return results, moved


def _transpose(cotangents, *arrays, transpose, num_known, **_):
    cotangents = [None if type(x) is ad.Zero else x for x in cotangents]
    return [None] * num_known + transpose(list(arrays[:num_known]), cotangents)


def _batch(axis, arrays, dims, **facts):
    if all(dim is None for dim in dims):
        return _linear_map.bind(*arrays, **facts), [None] * len(facts["types"])
    arrays = [
        x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(arrays, dims, strict=True)
    ]
    axes = [None if dim is None else 0 for dim in dims]
    of_known, of_moving = axes[: facts["num_known"]], axes[facts["num_known"] :]

    def mapped(name, *in_axes):
        spmd_axis = axis.spmd_name
        return jax.vmap(facts[name], in_axes, axis_size=axis.size, spmd_axis_name=spmd_axis)

    every_transpose = mapped("transpose", of_known, 0)

    def transpose(known, cotangents):
        found = every_transpose(known, cotangents)
        # Summed here, where 16 bits are summed in float32: JAX would sum them in 16 bits.
        return [x.sum(0) if i is None else x for x, i in zip(found, of_moving, strict=True)]

    results = _linear_map.bind(
        *arrays,
        apply=mapped("apply", of_known, of_moving),
        transpose=transpose,
        num_known=facts["num_known"],
        types=tuple(
            unmapped_aval(axis.size, 0, x, axis.explicit_mesh_axis) for x in facts["types"]
        ),
    )
    return results, [0] * len(results)


_linear_map.def_impl(_evaluate)
_linear_map.def_abstract_eval(lambda *_, types, **__: types)
ad.primitive_jvps[_linear_map] = _differentiate
ad.primitive_transposes[_linear_map] = _transpose
batching.fancy_primitive_batchers[_linear_map] = _batch
mlir.register_lowering(_linear_map, mlir.lower_fun(_evaluate, multiple_results=True))
