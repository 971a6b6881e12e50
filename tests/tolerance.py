"""The one tolerance rule of the project.

    |got - exact|  <=  2 |same - exact|  +  floor

in two norms, the largest element and the root mean square.
`exact` is the float64 oracle and `same` the oracle's same-precision reading, so the bound is in
units of the error that the input dtype makes unavoidable.  For bfloat16 and float16 the floor is
what that dtype loses, twice, by adding and taking away 0.3 (of the largest element, if that is
below one); float32 results (the LSE always) get 2^-17 (1 + max |exact|), room for the reordering of
sums and for hardware exp2 and log2.  Infinities and NaN must stand at the same places.
"""

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

FACTOR = 2.0


def _largest(x):
    return np.max(np.abs(x), initial=0.0)


def _root_mean_square(x):
    return np.sqrt(np.mean(np.square(x))) if x.size else 0.0


NORMS = {"largest": _largest, "rms": _root_mean_square}


def floor(exact, dtype, norm):
    """The part of the bound that does not depend on the same-precision reference."""
    if np.dtype(dtype) == np.float32:
        return 2.0**-17 * (1.0 + _largest(exact))
    step = np.asarray(0.3 * min(1.0, _largest(exact)), dtype)
    exact = exact.astype(dtype)
    return FACTOR * norm(((exact + step) - step).astype(np.float64) - exact.astype(np.float64))


def check(name, got, exact, same):
    """Raise AssertionError unless `got` is as near to `exact` as the rule demands."""
    dtype = np.asarray(got).dtype
    got, exact, same = (np.asarray(x).astype(np.float64) for x in (got, exact, same))
    assert got.shape == exact.shape, f"{name}: shape {got.shape}, expected {exact.shape}"
    for kind, is_kind in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        differ = np.argwhere(is_kind(got) != is_kind(exact))
        if len(differ):
            first = tuple(differ[0])
            raise AssertionError(
                f"{name}: {kind} at other places than in the oracle, {len(differ)} elements, first "
                f"at {differ[0].tolist()}: got {got[first]}, oracle {exact[first]}"
            )
    finite = np.isfinite(exact) & np.isfinite(same)
    got, exact, same = (np.where(finite, x, 0.0) for x in (got, exact, same))
    error = np.abs(got - exact)
    for norm_name, norm in NORMS.items():
        unavoidable = norm(same - exact)
        bound = FACTOR * unavoidable + floor(exact, dtype, norm)
        if norm(error) > bound:
            worst = np.unravel_index(np.argmax(error), error.shape)
            raise AssertionError(
                f"{name}: {norm_name} error {norm(error):.3e} above the bound {bound:.3e} "
                f"(same-precision {unavoidable:.3e}); worst at {[int(i) for i in worst]}: "
                f"got {got[worst]:.6g}, oracle {exact[worst]:.6g}; "
                f"{np.sum(error > bound)} of {error.size} elements above the bound"
            )
