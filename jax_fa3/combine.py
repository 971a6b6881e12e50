"""`combine`: attention over parts of the keys, put together by the log-sum-exps of the parts."""

from __future__ import annotations

from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jax_fa3.arguments import as_array
from jax_fa3.operands import DTYPES
from jax_fa3.validate import check_dtype
from jax_fa3.values import as_int, shape_of


def combine(
    outs: ArrayLike,
    lses: ArrayLike,
    axis: int | None = None,
    axis_name: Hashable | None = None,
    out_dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over all keys, of attention over parts of them.

    Each part has out and lse as `dot_product_attention` and `cached_attention` return them with
    return_residual; ask them for out in float32, or each part is rounded first. Differentiable.

    Args:
      outs: floating [n, ..., N, H], n parts on dimension `axis`.
      lses: floating [n, ..., N], natural log; -inf is a part that sees no key, which weighs nothing
        whatever its out is.
      axis: the dimension of the parts, by default 0, or, with axis_name, none.
      axis_name: a mesh axis, or several, of jax.shard_map (or jax.vmap) over whose devices the
        parts, or further parts, are spread; every device gets the result.
      out_dtype: of out, by default float32.

    Returns:
      (out, lse) without the dimension of the parts, lse float32. Where all parts are empty, 0 and
      -inf, with gradients 0. A single part that is not empty is returned as it is.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit.

    Example:
      >>> outs, lses = jnp.ones((2, 5, 4, 64)), jnp.zeros((2, 5, 4))
      >>> out, lse = jax_fa3.combine(outs, lses)
      >>> out.shape, lse.shape
      ((5, 4, 64), (5, 4))
    """
    outs, lses = jnp.asarray(as_array("outs", outs)), jnp.asarray(as_array("lses", lses))
    for name, x in (("outs", outs), ("lses", lses)):
        check_dtype(name, x, (*DTYPES, "float64"))
    if tuple(lses.shape) != tuple(outs.shape[:-1]):
        raise ValueError(
            f"lses has shape {shape_of(lses)}; expected {outs.shape[:-1]} like outs, shape "
            f"{shape_of(outs)}, without its last dimension"
        )
    if axis is None and axis_name is None:
        axis = 0
    if axis is not None:
        axis = _checked_axis(axis, lses)
    out_dtype = jnp.dtype(jnp.float32 if out_dtype is None else out_dtype)
    if out_dtype.name not in DTYPES:
        raise ValueError(f"out_dtype is {out_dtype.name}; expected one of {DTYPES}")

    lses = lses.astype(jnp.float32)
    is_empty = lses == -jnp.inf
    largest = lax.stop_gradient(lses)
    largest = largest if axis is None else largest.max(axis, keepdims=True)
    if axis_name is not None:
        largest = lax.pmax(largest, axis_name)
    largest = jnp.where(largest == -jnp.inf, 0, largest)
    # What is empty is replaced before exp, whose derivative would make NaN of it.
    weights = jnp.where(is_empty, 0, jnp.exp(jnp.where(is_empty, largest, lses) - largest))
    weighed = weights[..., None] * jnp.where(is_empty[..., None], 0, outs.astype(jnp.float32))
    if axis is not None:
        weights, weighed, largest = weights.sum(axis), weighed.sum(axis), largest.squeeze(axis)
    if axis_name is not None:
        weights, weighed = lax.psum((weights, weighed), axis_name)
    is_empty = weights == 0
    total = jnp.where(is_empty, 1, weights)
    out = (weighed / total[..., None]).astype(out_dtype)
    return out, jnp.where(is_empty, -jnp.inf, largest + jnp.log(total))


def _checked_axis(axis: int, lses: jax.Array) -> int:
    axis = as_int("axis", axis, "an int or None")
    if not -lses.ndim <= axis < lses.ndim:
        raise ValueError(f"axis is {axis}; expected a dimension of lses, shape {shape_of(lses)}")
    axis %= lses.ndim
    if lses.shape[axis] == 0:
        raise ValueError(f"lses has no parts, shape {shape_of(lses)}; expected at least 1")
    return axis
