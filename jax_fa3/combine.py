"""`combine`: merges attention over parts of the keys by the log-sum-exps of the parts."""

from __future__ import annotations

from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jax_fa3.arguments import as_array
from jax_fa3.operands import DTYPES
from jax_fa3.validate import check_dtype
from jax_fa3.values import as_int, check_out_dtype, shape_of


def combine(
    outs: ArrayLike,
    lses: ArrayLike,
    axis: int | None = None,
    axis_name: Hashable | None = None,
    out_dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Merges attention over parts of the keys into attention over all keys.

    Each part has out and lse from `dot_product_attention` or `cached_attention` with
    return_residual. Compute out in float32 if possible; otherwise each part is rounded before the
    merge. Differentiable.

    Args:
      outs: floating [n, ..., N, H], with n parts along dimension `axis`.
      lses: floating [n, ..., N], natural log. -inf marks a part that sees no key; such a part has
        weight 0, even if its out is NaN.
      axis: the dimension of the parts; default 0, or, with axis_name, no dimension.
      axis_name: a mesh axis, or several, of jax.shard_map (or jax.vmap), whose devices hold the
        parts, or additional parts; every device gets the result.
      out_dtype: the dtype of out; default float32.

    Returns:
      (out, lse) without the dimension of the parts; lse is float32. If all parts are empty, out is
      0, lse is -inf and gradients are 0. A single part that is not empty is returned unchanged.

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
        if lses.ndim == 0:
            raise ValueError(
                f"outs has shape {shape_of(outs)}; expected parts along the first of at least 2 "
                "dimensions, or axis_name"
            )
    if axis is not None:
        axis = _checked_axis(axis, lses)
    check_out_dtype("out_dtype", out_dtype, DTYPES)
    out_dtype = jnp.dtype(jnp.float32 if out_dtype is None else out_dtype)

    lses = lses.astype(jnp.float32)
    is_empty = lses == -jnp.inf
    largest = lax.stop_gradient(lses)
    largest = largest if axis is None else largest.max(axis, keepdims=True)
    if axis_name is not None:
        largest = lax.pmax(largest, axis_name)
    largest = jnp.where(largest == -jnp.inf, 0, largest)
    # Empty parts are replaced before exp, whose derivative at -inf - -inf would be NaN.
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
