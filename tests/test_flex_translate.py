"""Score and mask functions as CUDA C text: compiled for the host, beside JAX and float64."""

import functools

import flex_functions
import flex_host
import flex_oracle
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flex_host import needs_compiler
from jax import lax

from jax_fa3.flex.translate import Untranslatable, translate

NUM_FUNCTIONS, NUM_POINTS = 200, 64
COMPILER_OPTIONS = {
    "xla_allow_excess_precision": False,  # what is rounded to 16 bits stays so
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
}


def types_of(arrays):
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)


def with_slope(score_mod):
    def call(score, *rest):
        return jax.jvp(lambda x: score_mod(x, *rest), (score,), (jnp.float32(1),))

    return call


def over_points(function, score, index, captured):
    axes = (0,) * 5 + (None,) * len(captured)
    return jax.vmap(function, axes)(score, *index.T, *captured)


def check(name, got, exact, bound, decided):
    """Where a point is decided, the result is as near to float64's as its bound allows."""
    same = (got == exact) | (np.isnan(got) & np.isnan(exact))
    with np.errstate(invalid="ignore"):
        near = np.abs(got - exact) <= bound + 1e-37
    wrong = np.flatnonzero(decided & ~same & ~near)
    if wrong.size:
        i = wrong[0]
        raise AssertionError(
            f"{name}: {wrong.size} points, first {i}: got {got[i]!r}, float64 {exact[i]!r}, "
            f"bound {bound[i]!r}"
        )


@needs_compiler
def test_random_functions(tmp_path):
    """Values, derivatives, masks and addends, of text and of JAX, are float64's."""
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    functions = [flex_functions.random_functions(rng) for _ in range(NUM_FUNCTIONS)]
    captured = flex_functions.captured_arrays(rng)
    score, index = flex_functions.points(rng, NUM_POINTS)

    types = types_of(captured)
    translations = [translate(s, m, types) for s, m, _ in functions]
    assert [x.is_additive for x in translations] == [x for *_, x in functions]
    calls = flex_host.compiled(translations, tmp_path, len(captured))

    scalars = [jax.ShapeDtypeStruct((), x) for x in ("float32", *["int32"] * 4)]
    jaxprs = [jax.make_jaxpr(with_slope(s))(*scalars, *types) for s, *_ in functions]

    def jax_results(*x):
        return [
            over_points(lambda *y, s=s, m=m: (*with_slope(s)(*y), m(*y[1:])), *x)
            for s, m, _ in functions
        ]

    def oracle_results(*x):
        return [over_points(lambda *y, j=j: flex_oracle.evaluate(j, y), *x) for j in jaxprs]

    def run(function):
        arrays = score, index, [*map(jnp.asarray, captured)]
        lowered = jax.jit(function).lower(*arrays)
        return jax.tree.map(np.asarray, lowered.compile(COMPILER_OPTIONS)(*arrays))

    of_jax = run(jax_results)
    with jax.enable_x64(True):
        of_oracle = run(oracle_results)

    num_decided = 0
    for i, call in enumerate(calls):
        got = call(score, index, captured)
        value, slope, mask = of_jax[i]
        ((exact, bound), (exact_slope, slope_bound)), decided = of_oracle[i]
        np.testing.assert_array_equal(got["mask"], mask)
        num_decided += decided.sum()
        check(f"JAX {i}", value, exact, 2 * bound, decided)
        check(f"JAX {i} slope", slope, exact_slope, 2 * slope_bound, decided)
        exact, exact_slope = np.where(mask, exact, -np.inf), np.where(mask, exact_slope, 0)
        check(f"{i}", got["score"], exact, bound, decided)
        check(f"{i} slope", got["slope"], exact_slope, slope_bound, decided)
        if translations[i].is_additive:
            bound = bound + 4 * flex_oracle.ULP * (np.abs(score) + np.abs(got["addend"]))
            check(f"{i} addend", got["addend"] + score, exact, bound, decided)
    assert num_decided >= 0.9 * NUM_FUNCTIONS * NUM_POINTS
