"""Score and mask functions as CUDA C text: compiled for the host, beside JAX and float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flex_functions
import flex_host
import flex_oracle
from flex_host import needs_compiler
from jax_fa3.flex.link import MOST_INDEX
from jax_fa3.flex.ranges import chosen, decided, of_operation
from jax_fa3.flex.text import HELPERS, Program
from jax_fa3.flex.translate import Untranslatable, translate
from nvrtc import compiled, needs_nvrtc

NUM_FUNCTIONS, NUM_POINTS = 200, 64
COMPILER_OPTIONS = {
    "xla_allow_excess_precision": False,  # what is rounded to 16 bits stays so
    "xla_backend_optimization_level": 0,
}
if jax.__version_info__ < (0, 11):
    COMPILER_OPTIONS["xla_cpu_use_fusion_emitters"] = False  # compiles faster


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
    bounds = MOST_INDEX, None  # the text may know how large indices are
    translations = [translate(s, m, types, bounds[i % 2]) for i, (s, m, _) in enumerate(functions)]
    # Others may turn out to be additive too; then their addends tell whether they are.
    expected = zip(translations, functions, strict=True)
    assert all(x.is_additive for x, (*_, is_additive) in expected if is_additive)
    calls = flex_host.compiled(translations, tmp_path)

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
            addend = got["addend"] / flex_host.UNIT
            bound = bound + 4 * flex_oracle.ULP * (np.abs(score) + np.abs(addend))
            check(f"{i} addend", addend + score, exact, bound, decided)
        else:
            assert np.isnan(got["key_slope"]).all()
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
    + [jnp.log2, *([lambda x: lax.polynomial(x, [1.5, x, -2.0])] * hasattr(lax, "polynomial"))]
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
    calls = flex_host.compiled(translations, tmp_path)

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


def sliding_window(batch, head, query, key, *captured):
    return (query >= key) & (query - key <= 64)


def alibi(score, batch, head, query, key):
    slope = jnp.exp2(-0.5 * (head + 1).astype(jnp.float32))
    return score + slope * (key - query).astype(jnp.float32)


def softcap(score, batch, head, query, key):
    return 30 * jnp.tanh(score / 30)


def relative(score, batch, head, query, key, table):
    return score + table[head, jnp.clip(key - query, -4, 4) + 4]


def t5(score, batch, head, query, key, table):
    distance = key - query
    near = jnp.abs(distance)
    far = 8 + (2 * jnp.log2(jnp.maximum(near, 8).astype(jnp.float32) / 8)).astype(jnp.int32)
    bucket = jnp.where(near < 8, near, jnp.minimum(far, 15)) + jnp.where(distance > 0, 16, 0)
    return score + table[bucket, head]


def same_document(batch, head, query, key, ids):
    return ids[batch, query] == ids[batch, key]


TABLE = jax.ShapeDtypeStruct((4, 9), jnp.bfloat16)
KNOWN = {
    "alibi": (alibi, sliding_window, ()),
    "softcap": (softcap, None, ()),
    "relative": (relative, None, (TABLE,)),
    "t5": (t5, None, (jax.ShapeDtypeStruct((32, 4), jnp.float32),)),
    "documents": (None, same_document, (jax.ShapeDtypeStruct((2, 64), jnp.int32),)),
    "nothing": (None, None, ()),
}


@needs_nvrtc
@pytest.mark.parametrize("name", KNOWN)
def test_nvrtc(name):
    """The text compiles for the device without a header or a warning; no arrays in local memory."""
    text = translate(*KNOWN[name]).text
    ptx = compiled(text, "PTX").decode()
    names = ["jfa_score", "jfa_score_and_slope", "jfa_mask", "jfa_is_additive", "jfa_addend"]
    names += ["jfa_has_key_slope", "jfa_key_slope"]
    assert all(f"{name}(" in ptx for name in names) and ".local" not in ptx
    assert compiled(text, "LTOIR")


@needs_nvrtc
def test_nvrtc_of_helpers_and_random_functions():
    rng = np.random.default_rng(0)
    types = types_of(flex_functions.captured_arrays(rng))
    texts = [translate(*flex_functions.random_functions(rng)[:2], types).text for _ in range(8)]
    every_helper = Program().text([f"// {name}\n" for name in HELPERS])
    for text in (*texts, every_helper):
        compiled(text, "LTOIR")


def test_what_is_additive():
    """A score that is only added to, once, what the product's unit can be multiplied into without
    an operation for each pair."""

    def is_additive(f):
        return translate(f, None, ()).is_additive

    assert is_additive(None) and is_additive(lambda s, *_: s) and is_additive(alibi)
    assert is_additive(lambda s, b, h, q, k: 2 + (s - h))
    assert is_additive(jax.jit(lambda s, *_: s + 1.0))
    assert is_additive(lambda s, b, h, q, k: s - 0.5 * jnp.abs(q - k) + 2.0 * jnp.sqrt(1.0 * q))
    assert not is_additive(lambda s, b, h, q, k: s + jnp.sqrt(1.0 * q))
    assert not is_additive(lambda s, b, h, q, k: s + q * (1.0 * k))
    assert not is_additive(lambda s, b, h, q, k: s + (q < k) * jnp.finfo("float32").min)
    assert not is_additive(lambda s, b, h, q, k: jnp.where(q < k, -jnp.inf, s))
    assert not is_additive(softcap)
    assert not is_additive(lambda s, *_: s + s)
    assert not is_additive(lambda s, *_: 1 - s)
    assert not is_additive(lambda s, *_: jnp.where(s > 0, s, -jnp.inf))
    assert not is_additive(lambda s, b, h, q, k: jnp.where(q < k, s, 0))
    assert not is_additive(lambda s, *_: s.astype(jnp.bfloat16).astype(jnp.float32))
    assert not is_additive(lambda s, b, h, q, k: q.astype(jnp.float32))
    assert not is_additive(lambda s, b, h, q, k: jax.lax.stop_gradient(s) + 0.1 * (k - q))
    assert not is_additive(lambda s, *_: reversing(s) + 1.0)


@jax.custom_jvp
def reversing(x):
    return x


@reversing.defjvp
def _reversing_jvp(primals, tangents):
    return primals[0], -tangents[0]


@needs_compiler
def test_zeros_made_of_integers_have_no_sign(tmp_path):
    functions = [
        lambda s, b, h, q, k: s * jnp.sign(1 / (-k).astype(jnp.float32)),
        lambda s, b, h, q, k: s * jnp.sign(1 / (-2 * (q - k)).astype(jnp.float32)),
        lambda s, b, h, q, k: s * jnp.sign(1 / ((k - q) * (q + 1)).astype(jnp.float32)),
    ]
    translations = [translate(f, None, (), MOST_INDEX) for f in functions]
    for call in flex_host.compiled(translations, tmp_path):
        np.testing.assert_array_equal(call(np.ones(1), np.zeros((1, 4)))["score"], 1)


@needs_compiler
def test_addends_of_a_head(tmp_path):
    """Infinities and NaN stay what they are in the product's units, and what is finite stays so."""
    values = np.array([-np.inf, np.inf, np.nan, 3e38, -1.5], np.float32)
    add = lambda s, b, h, q, k, x: s + x[h]  # noqa: E731
    scaled = lambda s, b, h, q, k, x: s + x[h] * (1.0 * k - q)  # noqa: E731
    translations = [translate(f, None, (values,)) for f in (add, scaled)]
    assert all(x.is_additive for x in translations)
    index = np.array([[0, h, 2, 2] for h in range(len(values))], np.int32)
    of_add, of_scaled = (
        f(np.ones(len(values)), index, [values])["addend"]
        for f in flex_host.compiled(translations, tmp_path)
    )
    np.testing.assert_allclose(of_add / flex_host.UNIT, values)
    np.testing.assert_array_equal(of_scaled, [np.nan, np.nan, np.nan, 0, 0])


SLOPES = {  # by function of a head, and None where there is none that holds for all keys
    alibi: lambda h: 2.0 ** (-0.5 * (h + 1)),
    (lambda s, b, h, q, k: s + 0.5 * (3 * k - q).astype(jnp.float32)): lambda h: 1.5,
    (lambda s, b, h, q, k: s - 0.25 * k * (h + 1) + 2.0 * q): lambda h: -0.25 * (h + 1),
    (lambda s, b, h, q, k: s + (0.5 * k - (2.0 * k - 1.0 * q))): lambda h: -1.5,
    (lambda s, b, h, q, k: s + (1.0 * q - 0.125 * (5 - k))): lambda h: 0.125,
    (lambda s, *_: s): None,
    (lambda s, b, h, q, k: s + 0.5 * h): None,
    (lambda s, b, h, q, k: s - 0.5 * q): None,
    (lambda s, b, h, q, k: s - 0.5 * jnp.abs(q - k)): None,
    (lambda s, b, h, q, k: s - 0.5 * jnp.maximum(q - k, 0)): None,
    (lambda s, b, h, q, k: s + 0.5 * (k * k // 4096)): None,
    (lambda s, b, h, q, k: s + 0.5 * (k % 128) + 0.5 * k): None,
    (lambda s, b, h, q, k: s + 0.5 * (k * 4096 * 4096)): None,  # it wraps around
    (lambda s, b, h, q, k: s + 0.5 * (1.0 * k).astype(jnp.bfloat16).astype(jnp.float32)): None,
    (lambda s, b, h, q, k: s * 2 + 0.5 * k): None,
}


@needs_compiler
def test_slopes_along_keys(tmp_path):
    """What an additive function grows by from key to key, where its text says so."""
    most, count = 2**20, 1000
    translations = [translate(f, None, (), most) for f in SLOPES]
    rng = np.random.default_rng()
    heads, rows, keys = (rng.integers(0, n, count) for n in (16, most, most))
    index = np.stack([np.zeros(count), heads, rows, keys], 1).astype(np.int32)
    calls = flex_host.compiled(translations, tmp_path)
    for call, slope in zip(calls, SLOPES.values(), strict=True):
        got = call(np.ones(count), index)
        if slope is None:
            assert np.isnan(got["key_slope"]).all()
            continue
        expected = np.array([slope(h) for h in heads])
        np.testing.assert_allclose(got["key_slope"] / flex_host.UNIT, expected, rtol=1e-6)
        at_0 = call(np.ones(count), index * [1, 1, 1, 0])["addend"]
        along = at_0 + got["key_slope"].astype(np.float64) * keys
        np.testing.assert_allclose(got["addend"], along, rtol=1e-5, atol=1e-6 * most)


def test_text():
    """Short, without what is not needed, and the same for equal functions."""
    found = translate(relative, None, (TABLE,))
    assert found == translate(lambda *x: relative(*x), None, (TABLE,))
    assert hash(found) == hash(translate(relative, None, (TABLE,)))
    name = "JFA_FUNCTION float jfa_score("
    text = found.text[found.text.index(name) :]
    assert text[: text.index("}\n") + 1].splitlines() == [
        name,
        "    float score, int, int head, int query, int key, const JfaCaptured& captured) {",
        "  const int v0 = (int)((unsigned)key - (unsigned)query);",
        "  const int v1 = (-4) < v0 ? v0 : (-4);",
        "  const int v2 = 4 < v1 ? 4 : v1;",
        "  const int v3 = (int)((unsigned)v2 + (unsigned)4);",
        "  const bool v4 = head < 0;",
        "  const int v5 = (int)((unsigned)head + (unsigned)4);",
        "  const int v6 = v4 ? v5 : head;",
        "  const int v7 = v6 < 0 ? 0 : (v6 < 3 ? v6 : 3);",
        "  const int v8 = v7 * 9 + v3;",
        "  const unsigned short v9 = ((const unsigned short*)captured.array[0])[v8];",
        "  const float v10 = jfa_load_bfloat16(v9);",
        "  const float v11 = score + v10;",
        "  return v11;",
        "}",
    ]


OPERATIONS = ("add", "sub", "mul", "square", "neg", "abs", "sign", "min", "max", "clamp")


def test_ranges():
    """Of all numbers of small ranges, what a range says of an operation's result is true."""
    rng = np.random.default_rng(0)
    bounds = [(0, 0), (-3, 5), (2, 9), (-8, -1), (100, 127), (-128, -120)]

    def wrapped(x):
        return (x + 128) % 256 - 128

    for x, y, z in rng.choice(len(bounds), (60, 3)):
        x, y, z = (bounds[i] for i in (x, y, z))
        numbers = [np.arange(low, high + 1) for low, high in (x, y, z)]
        a, b, c = np.meshgrid(*numbers)
        results = dict(
            add=a + b, sub=a - b, mul=a * b, square=a * a, neg=-a, abs=np.abs(a), sign=np.sign(a)
        )
        results |= dict(min=np.minimum(a, b), max=np.maximum(a, b))
        results["clamp"] = np.minimum(np.maximum(a, b), c)
        for name in OPERATIONS:
            arity = dict(clamp=3, add=2, sub=2, mul=2, min=2, max=2).get(name, 1)
            low, high = of_operation(name, "int8", *(x, y, z)[:arity])
            got = wrapped(results[name])
            assert low <= got.min() and got.max() <= high, (name, x, y, z)
        for name in ("min", "max"):
            which = chosen(name, x, y)
            assert which is None or np.array_equal(results[name], (a, b)[which])
        comparisons = dict(lt=a < b, le=a <= b, gt=a > b, ge=a >= b, eq=a == b, ne=a != b)
        for name, said in comparisons.items():
            if decided(name, x, y) is not None:
                assert (said == decided(name, x, y)).all(), (name, x, y)


def test_what_ranges_save():
    """A wrapped or clamped index is no work where it is known to be within, nor is a cast."""

    def alibi(score, b, h, q, k, slopes):
        return score - slopes[h] * jnp.abs(q - k)

    def by_key(score, b, h, q, k, slopes):
        return score + slopes[jnp.clip(k, 0, 3)]

    slopes = jax.ShapeDtypeStruct((4,), jnp.float32)
    short, any_length = (translate(alibi, None, (slopes,), x).text for x in (MOST_INDEX, None))
    assert "jfa_raised" in short and "jfa_raised" not in any_length
    assert "head < 0" in any_length and "head < 0" not in short
    assert translate(by_key, None, (slopes,), MOST_INDEX).text.count(" < 0") == 0


READS = [
    *(lambda c, i, j, m=m: c[1].at[i, j].get(mode=m) for m in ("fill", "clip")),
    *(lambda c, i, j, m=m: jnp.take(c[0], i ^ j, mode=m) for m in ("fill", "clip", "wrap")),
    lambda c, i, j: c[0].at[i].get(mode="promise_in_bounds"),
    lambda c, i, j: c[1][i, j],
    lambda c, i, j: c[1][i][j],
    lambda c, i, j: c[1].at[i, 2].get(mode="fill", fill_value=3),
    lambda c, i, j: lax.dynamic_slice(c[1], (i, j), (2, 3))[1, 2],
    lambda c, i, j: c[1].T.reshape(-1)[j],
    lambda c, i, j: jnp.concatenate([c[0], 2 * c[0]])[i],
    lambda c, i, j: jnp.stack([c[1][0], c[1][2]])[i, j],
    lambda c, i, j: c[1][i.astype(jnp.int8), j.astype(jnp.uint32)],
    lambda c, i, j: c[1].at[i.astype(jnp.uint8), j.astype(jnp.uint16)].get(mode="fill"),
    lambda c, i, j: jnp.arange(5)[i].astype(jnp.float32) + jnp.tile(c[0], 2)[j],
]


@needs_compiler
def test_indices_out_of_range(tmp_path):
    """Every index gives what JAX gives, and none reads what is beside an array."""
    arrays = np.float32([1, 2, 3, 4, 5]), np.arange(10, 22, dtype=np.float32).reshape(3, 4)
    ends = np.iinfo(np.int32)
    some = np.int32([ends.min, -300, -129, -13, -6, -5, -4, -1, 0, 1, 2, 3, 4, 5, 130, ends.max])
    x, y = map(np.ravel, np.meshgrid(some, some))
    index = np.stack([0 * x, 0 * x, x, y], 1)

    def score_mod(read, score, batch, head, query, key, *captured):
        return score * read(captured, query, key)

    functions = [functools.partial(score_mod, read) for read in READS]
    calls = flex_host.compiled([translate(f, None, types_of(arrays)) for f in functions], tmp_path)
    for call, f in zip(calls, functions, strict=True):
        score = np.ones(len(x), np.float32)
        want = jax.jit(over_points, static_argnums=0)(f, score, index, arrays)
        got = call(score, index, arrays)
        np.testing.assert_array_equal(got["score"], want)
        np.testing.assert_array_equal(got["slope"], want)


@needs_compiler
def test_rules_of_ones_own(tmp_path):
    """The derivative of jax.custom_vjp and jax.custom_jvp is the one that they tell."""

    @jax.custom_vjp
    def straight_through(x):
        return lax.round(x)

    straight_through.defvjp(lambda x: (lax.round(x), None), lambda _, g: (g,))
    bent = jax.custom_jvp(lambda x: x * 2)
    bent.defjvp(lambda x, dx: (bent(*x), 5 * dx[0]))
    functions = [lambda s, *_: jax.jit(straight_through)(s) * 3, lambda s, *_: bent(s)]
    first, second = flex_host.compiled([translate(f, None, ()) for f in functions], tmp_path)
    score = np.float32([0.75, -1.25])
    np.testing.assert_array_equal(first(score, np.zeros((2, 4)))["slope"], [3, 3])
    np.testing.assert_array_equal(second(score, np.zeros((2, 4)))["slope"], [5, 5])


@needs_compiler
def test_sixty_four_bits(tmp_path):
    """Integers of 64 bits are translated; float64 is not."""
    with jax.enable_x64(True):
        arrays = (np.int64([2**40, -3, 7]),)

        def score_mod(score, batch, head, query, key, big):
            return score + (big[query] * 5 // (big[key] | 1)).astype(jnp.float32)

        (call,) = flex_host.compiled([translate(score_mod, None, types_of(arrays))], tmp_path)
        index = np.stack([np.zeros(9), np.zeros(9), *np.divmod(np.arange(9), 3)], 1)
        want = np.array([score_mod(1.0, 0, 0, int(q), int(k), arrays[0]) for *_, q, k in index])
        np.testing.assert_array_equal(call(np.ones(9), index, arrays)["score"], want)
        with pytest.raises(Untranslatable, match="convert_element_type makes float64"):
            translate(lambda s, *_: (s.astype(jnp.float64) + 1).astype(jnp.float32), None, ())


def looped(score, batch, head, query, key):
    return lax.while_loop(lambda x: x > 1, lambda x: x / 2, score)  # the line that is named


def test_what_is_untranslatable():
    """Errors name what it is and where it stands."""
    line = looped.__code__.co_firstlineno + 1
    with pytest.raises(Untranslatable, match=rf"^score_mod: .* while .*translate\.py:{line}"):
        translate(looped, None, ())
    inner = jax.jit(lambda x: jnp.sort(jnp.stack([x, -x]))[0])
    with pytest.raises(Untranslatable, match=r"mask_mod: the primitive sort .*translate\.py"):
        translate(None, lambda b, h, q, k: inner(q) > 0, ())
    with pytest.raises(Untranslatable, match=r"primitive lgamma of \(float32\)"):
        translate(lambda s, *_: lax.lgamma(s), None, ())
    big = np.zeros((40, 40), np.float32)
    with pytest.raises(Untranslatable, match=r"closes over an array of shape \(40, 40\)"):
        translate(lambda s, b, h, q, k: s + jnp.asarray(big)[q, k], None, ())


def test_what_is_not_used_is_not_translated():
    def score_mod(score, *_):
        lax.while_loop(lambda x: x < 1, jnp.exp, score)
        return 2 * score

    assert translate(score_mod, None, ()) == translate(lambda s, *_: 2 * s, None, ())


@pytest.mark.parametrize(
    ("captured", "message"),
    [
        (np.zeros((2,) * 5, np.float32), r"array 0, float32\[2, 2, 2, 2, 2\]: at most 4 dim"),
        (np.zeros(3, np.complex64), r"array 0, complex64\[3\]: the dtype"),
        (np.zeros(3, np.float64), r"array 0, float64\[3\]: the dtype"),
        (np.zeros((0, 3), np.float32), r"array 0, float32\[0, 3\]: it has no elements"),
    ],
    ids=["dims", "complex", "float64", "empty"],
)
def test_captured_arrays_that_cannot_be(captured, message):
    with pytest.raises(Untranslatable, match=message):
        translate(None, None, (captured,))


def test_captured_arrays_that_are_read():
    """Eight may be, of any number."""

    def of(numbers):
        return lambda s, b, h, q, k, *arrays: s + sum(arrays[i][q] for i in numbers)

    arrays = [np.zeros(3 + i, np.float32) for i in range(20)]
    found = translate(of([17, 2, 5]), lambda b, h, q, k, *arrays: arrays[3][k] > 0, arrays)
    assert found.captured == (2, 3, 5, 17)
    assert re.findall(r"captured\.array\[3\]\)\[(v\d+)\]", found.text)
    assert "captured.array[4]" not in found.text
    assert len(translate(of(range(8, 16)), None, arrays).captured) == 8
    with pytest.raises(Untranslatable, match="read 9 captured arrays; at most 8"):
        translate(of(range(9)), None, arrays)


def test_closed_over_tracer():
    @jax.jit
    def call(x):
        translate(lambda s, *_: s + x, None, ())

    with pytest.raises(Untranslatable, match="closes over a traced array; pass"):
        call(1.0)


def test_results_of_another_kind():
    with pytest.raises(TypeError, match=r"score_mod returns int32\[\]; expected one scalar, float"):
        translate(lambda s, b, *_: b, None, ())
    with pytest.raises(TypeError, match=r"mask_mod returns bool\[2\]; expected one scalar, bool"):
        translate(None, lambda *_: jnp.ones(2, bool), ())
