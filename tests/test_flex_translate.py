"""Score and mask functions as CUDA C text: compiled for the host, beside JAX and float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import flex_functions
import flex_host
import flex_oracle
from flex_host import needs_compiler
from jax_fa3.flex.translate import translate

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


INTEGERS = ("int8", "int16", "int32", "uint8", "uint16", "uint32")
FLOATS = ("float32", "bfloat16", "float16")
EDGES = [0.0, -0.0, 1, -1, 0.5, 2.5, -2.5, 1e-3, 100.25, -128.5, 255.5, 65504, 65535.5, -7e4, 3e9]
EDGES += [-3e9, 1e30, np.inf, -np.inf, np.nan]


def edges(dtype):
    """20 values."""
    if dtype == "bool":
        return np.arange(20) % 2 == 1
    if dtype in FLOATS:
        return np.array(EDGES).astype(jnp.dtype(dtype))
    info = np.iinfo(dtype)
    near = [info.min, info.min + 1, info.max, info.max - 1, info.max // 2 + 1, 0, 1, 2, 3, 5, 7, 8]
    near += [-1, -2, -7, 15, 16, 31, 32, 33]
    return np.array(near).astype(np.int64).astype(dtype)


UNARY = {
    ("int8", "int16", "int32"): [lax.abs],
    INTEGERS: [lax.neg, lax.sign, lax.bitwise_not, lax.population_count, lax.clz]
    + [lambda x: lax.integer_pow(x, 3)],
    FLOATS: [lax.neg, lax.abs, lax.sign, lax.floor, lax.ceil, lax.round, lax.is_finite, lax.sqrt]
    + [lax.square, lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)],
    ("float32",): [lax.exp, lax.exp2, lax.expm1, lax.log, lax.log1p, lax.tanh, lax.logistic]
    + [lax.rsqrt, lax.cbrt, lax.erf, lax.erfc, lax.atan, lax.asinh, lax.acosh, lax.atanh, lax.asin]
    + [lax.acos, lax.sinh, lax.cosh, lambda x: lax.integer_pow(x, -3), lax.sin, lax.cos, lax.tan]
    + [lambda x: lax.bitcast_convert_type(x, jnp.int32), lambda x: lax.integer_pow(x, 0)],
    ("bool",): [lax.bitwise_not],
}
BINARY = {
    INTEGERS: [lax.add, lax.sub, lax.mul, lax.div, lax.rem, lax.min, lax.max, lax.lt, lax.eq]
    + [lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor, lax.shift_left]
    + [lax.shift_right_logical, lax.shift_right_arithmetic, lax.ge],
    FLOATS: [lax.add, lax.mul, lax.div, lax.min, lax.max, lax.lt, lax.ne, lax.ge],
    ("float32",): [lax.sub, lax.rem, lax.atan2, lax.pow, lax.eq, lax.le, lax.gt]
    + [lambda x, y: lax.clamp(-2.0, x, y), lambda x, y: lax.select_n(x < y, x, y)]
    + [lambda x, y: lax.pow(x, lax.convert_element_type(jnp.clip(y, -9, 9), jnp.int32))],
    ("int32",): [lambda x, y: lax.clamp(x, y, jnp.int32(5)), lambda x, y: lax.select_n(x, y, x, -y)]
    + [lambda x, y: lax.bitcast_convert_type(x ^ y, jnp.uint32)],
    ("bool",): [lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor, lax.eq],
}
CASTS = [
    (functools.partial(lax.convert_element_type, new_dtype=new), old)
    for old in (*INTEGERS, *FLOATS, "bool")
    for new in (*INTEGERS, *FLOATS, "bool")
    if old != new
]
PRIMITIVES = [
    *((f, dtype, 1) for dtypes, fs in UNARY.items() for dtype in dtypes for f in fs),
    *((f, dtype, 2) for dtypes, fs in BINARY.items() for dtype in dtypes for f in fs),
    *((f, dtype, 1) for f, dtype in CASTS),
]
EVERY = (*INTEGERS, *FLOATS, "bool")
EQUAL = ("neg", "abs", "sign", "floor", "ceil", "round", "is_finite", "min", "max", "lt", "ne")
EQUAL += ("ge", "le", "gt", "eq", "add", "sub", "mul", "div", "sqrt", "square")


def as_float32(x):
    """A scalar of any dtype as a float32 with the same information."""
    if x.dtype in (jnp.int32, jnp.uint32):
        return lax.bitcast_convert_type(x, jnp.float32)
    return x.astype(jnp.float32)


@needs_compiler
def test_primitives(tmp_path):
    """Each by itself, with every pair of edge values: as XLA has them on a CPU. Integers, bools,
    casts and what has one right result in floats are equal to the bit, but for the sign of zeros
    and of NaN."""
    x, y = np.divmod(np.arange(400, dtype=np.int32), 20)
    index = np.stack([0 * x, 0 * x, x, y], 1)
    arrays = {dtype: jnp.asarray(edges(dtype)) for dtype in EVERY}

    def score_mod(f, count, _score, _batch, _head, query, key, values):
        return as_float32(f(*(values[query], values[key])[:count]))

    translations = [
        translate(functools.partial(score_mod, f, n), None, types_of([arrays[dtype]]))
        for f, dtype, n in PRIMITIVES
    ]
    calls = flex_host.compiled(translations, tmp_path, 1)

    def expected(arrays):
        return [
            as_float32(f(*(arrays[dtype][x], arrays[dtype][y])[:n])) for f, dtype, n in PRIMITIVES
        ]

    compiled = jax.jit(expected).lower(arrays).compile(COMPILER_OPTIONS)
    wrong = []
    for (f, dtype, _), call, want in zip(PRIMITIVES, calls, compiled(arrays), strict=True):
        got, want = call(0 * x, index, [arrays[dtype]])["score"], np.asarray(want)
        name = getattr(f, "__name__", str(f))
        is_near = dtype == "float32" and name not in EQUAL
        same = (got == want) | (np.isnan(got) & np.isnan(want)) | (got.view("i") == want.view("i"))
        if is_near:
            same |= np.isclose(got, want, rtol=4e-6, atol=1e-37)
        if not same.all():
            i = np.flatnonzero(~same)[0]
            values = edges(dtype)[[x[i], y[i]]]
            wrong.append(f"{name} of {dtype} {values}: {got[i]!r}, JAX {want[i]!r}")
    assert not wrong, "\n".join(wrong)
