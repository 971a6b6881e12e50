"""Random score and mask functions of scalars, over what `jax_fa3.flex.translate` translates.

A function is a list of steps that is drawn once; each step takes values that are there already,
floats, integers and bools, and adds one. Steps keep numbers moderate, so that a function has few
infinities, and take derivatives where there are some.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BATCH, HEADS, ROWS, KEYS = 3, 4, 40, 56


def captured_arrays(rng):
    """What every random function may read."""
    return (
        rng.normal(size=HEADS).astype(np.float32),
        rng.normal(size=(HEADS, 9)).astype(jnp.bfloat16),
        rng.normal(size=(BATCH, 5, 7)).astype(np.float16),
        rng.integers(-9, 9, KEYS).astype(np.int32),
        rng.integers(0, 2, (ROWS, KEYS)).astype(np.bool_),
        rng.normal(size=(2, 3, 2, 5)).astype(np.float32),
        rng.integers(-128, 127, (BATCH, ROWS)).astype(np.int8),
        rng.integers(0, 9, (7, 11)).astype(np.uint16),
    )


def points(rng, count):
    """Scores [count] and indices [count, 4]."""
    index = rng.integers(0, [BATCH, HEADS, ROWS, KEYS], (count, 4)).astype(np.int32)
    return (3 * rng.normal(size=count)).astype(np.float32), index


def _moderate(x):
    return jnp.clip(x, -6.0, 6.0)


def _far(x):
    """Not near 0."""
    return jnp.where(x < 0, x - 0.5, x + 0.5)


@jax.custom_jvp
def _bent(x):
    return x * jnp.abs(x)


_bent.defjvp(lambda x, dx: (_bent(*x), 2 * jnp.abs(x[0]) * dx[0]))


@jax.custom_vjp
def _straight_through(x):
    return lax.round(x)


_straight_through.defvjp(lambda x: (lax.round(x), None), lambda _, g: (g,))

FLOAT_OF_FLOAT = [
    jnp.tanh,
    jnp.sin,
    jnp.cos,
    jnp.abs,
    jnp.negative,
    jnp.square,
    jnp.arctan,
    jnp.cbrt,
    jax.nn.sigmoid,
    jax.nn.softplus,
    jax.nn.relu,
    jax.nn.silu,
    jax.nn.gelu,
    lax.erf,
    jnp.floor,
    jnp.ceil,
    jnp.sign,
    jnp.round,
    lax.round,
    lambda x: jnp.tan(jnp.tanh(x)),
    lambda x: jnp.exp(_moderate(x)),
    lambda x: jnp.exp2(_moderate(x)),
    lambda x: jnp.expm1(_moderate(x)),
    lambda x: jnp.log1p(jnp.abs(x)),
    lambda x: jnp.log(jnp.abs(x) + 0.5),
    lambda x: jnp.sqrt(jnp.abs(x) + 0.25),
    lambda x: lax.rsqrt(jnp.abs(x) + 0.25),
    lambda x: lax.integer_pow(_moderate(x), 3),
    lambda x: lax.integer_pow(_far(x), -2),
    lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
    lambda x: jnp.tanh(x.astype(jnp.float16)).astype(jnp.float32),
    lambda x: (x.astype(jnp.bfloat16) * 3 + 1).astype(jnp.float32),
    lambda x: jnp.where(jnp.isfinite(x), x, 0.5),
    lambda x: jnp.stack([x, x + 1, 2 * x])[1],
    _bent,
    jax.jit(lambda x: 0.5 * x + jnp.maximum(x, 1.0)),
    jax.checkpoint(lambda x: jnp.sin(x) * x),
]
FLOAT_OF_FLOATS = [
    jnp.add,
    jnp.subtract,
    jnp.multiply,
    jnp.maximum,
    jnp.minimum,
    jnp.logaddexp,
    lambda x, y: x / _far(y),
    lambda x, y: jnp.arctan2(_far(x), _far(y)),
    lambda x, y: jnp.power(jnp.abs(_moderate(x)) + 0.5, jnp.tanh(y)),
    lambda x, y: lax.rem(x, 1.5 + jnp.abs(y)),
    lambda x, y: lax.clamp(-1.0, x, jnp.abs(y)),
    lambda x, y: lax.cond(x > y, jnp.tanh, lambda z: 2 * z, x),
]
INT_OF_INT = [
    jnp.abs,
    jnp.sign,
    jnp.negative,
    lax.population_count,
    lax.clz,
    jnp.bitwise_not,
    lambda i: jnp.clip(i, -4, 4),
    lambda i: i << 2,
    lambda i: i >> 1,
    lambda i: lax.shift_right_logical(i, 28),
    lambda i: i.astype(jnp.int8).astype(jnp.int32),
    lambda i: i.astype(jnp.uint16).astype(jnp.int32),
    lambda i: (i.astype(jnp.uint32) % 1000).astype(jnp.int32),
    lambda i: jnp.array([5, -3, 8, 1])[i],
    lambda i: jnp.arange(10, 30, 3)[i],
    lambda i: lax.switch(i, [lambda j: j, lambda j: j * 3, lambda j: -j], i),
    lambda i: lax.integer_pow(i & 15, 3),
]
INT_OF_INTS = [
    jnp.add,
    jnp.subtract,
    jnp.multiply,
    jnp.maximum,
    jnp.minimum,
    jnp.bitwise_and,
    jnp.bitwise_or,
    jnp.bitwise_xor,
    lax.div,
    lax.rem,
    lambda i, j: i // (jnp.abs(j) + 1),
    lambda i, j: i % (j | 1),
    lambda i, j: i << (j & 7),
    lambda i, j: lax.shift_right_arithmetic(i, j),
]
BOOL_OF_INTS = [jnp.equal, jnp.not_equal, jnp.less, lax.ge, lambda i, j: i <= j + 3]
BOOL_OF_FLOATS = [jnp.less, jnp.greater, lambda x, y: x >= y + 0.1, lambda x, y: jnp.isnan(x - y)]
BOOL_OF_BOOLS = [jnp.logical_and, jnp.logical_or, jnp.logical_xor, lambda p, q: ~p | q]
INT_OF_FLOAT = [
    lambda x: (3 * _moderate(x)).astype(jnp.int32),
    lambda x: jnp.floor(_moderate(x)).astype(jnp.int8).astype(jnp.int32),
    lambda x: (x * 20).astype(jnp.uint8).astype(jnp.int32),
]
FLOAT_OF_INT = [
    lambda i: i.astype(jnp.float32) * 0.01,
    lambda i: jnp.log1p(jnp.abs(i).astype(jnp.float32)),
    lambda i: (i & 63).astype(jnp.bfloat16).astype(jnp.float32) / 16,
    lambda i: jnp.exp2(-0.125 * (i & 31)),
]
CONSTANT = np.linspace(-1, 2, 12, dtype=np.float32)
FLOAT_READ = [
    lambda c, i, j: c[0][i],
    lambda c, i, j: c[1][i, j].astype(jnp.float32),
    lambda c, i, j: c[1][i][jnp.clip(j, -4, 4) + 4].astype(jnp.float32),
    lambda c, i, j: jnp.take(c[0], i, mode="clip"),
    lambda c, i, j: jnp.nan_to_num(jnp.take(c[0], i, mode="fill"), nan=0.75),
    lambda c, i, j: jnp.take(c[5][0, 1], i * 5 + j, mode="wrap"),
    lambda c, i, j: c[2].at[i, 2, j].get(mode="fill", fill_value=0.5).astype(jnp.float32),
    lambda c, i, j: c[2].at[1, i, j].get(mode="clip").astype(jnp.float32),
    lambda c, i, j: lax.dynamic_slice(c[5], (i, j, 0, i), (1, 2, 1, 3))[0, 1, 0, 2],
    lambda c, i, j: lax.dynamic_index_in_dim(c[5][1, :, 0], i, 0, keepdims=False)[j],
    lambda c, i, j: (2 * c[5][..., ::2] + c[5][..., :3])[1, i, j & 1, -1],
    lambda c, i, j: c[5].reshape(6, 10).T[j, i],
    lambda c, i, j: c[5].reshape(12, 5)[i, ::-1][j],
    lambda c, i, j: jnp.concatenate([c[0], c[0] * 2, c[5][0, 0, 0]])[i],
    lambda c, i, j: jnp.asarray(CONSTANT)[i & 7],
    lambda c, i, j: jnp.swapaxes(c[1].astype(jnp.float32), 0, 1)[j, i],
]
INT_READ = [
    lambda c, i, j: c[3][i],
    lambda c, i, j: c[6][i, j].astype(jnp.int32),
    lambda c, i, j: jnp.take(c[3], i, mode="fill", fill_value=-5),
    lambda c, i, j: c[7].at[i, j].get(mode="promise_in_bounds").astype(jnp.int32),
    lambda c, i, j: c[3][c[3][i] + j],
]
BOOL_READ = [
    lambda c, i, j: c[4][i, j],
    lambda c, i, j: c[4].at[i, j].get(mode="fill", fill_value=False),
    lambda c, i, j: c[6][0, i] == c[6][0, j],
]

STEPS = [  # weight, what makes a value, of which kinds, of which kind
    (6, FLOAT_OF_FLOAT, "f", "f"),
    (5, FLOAT_OF_FLOATS, "ff", "f"),
    (3, INT_OF_INT, "i", "i"),
    (4, INT_OF_INTS, "ii", "i"),
    (2, BOOL_OF_INTS, "ii", "b"),
    (1, BOOL_OF_FLOATS, "ff", "b"),
    (1, BOOL_OF_BOOLS, "bb", "b"),
    (1, INT_OF_FLOAT, "f", "i"),
    (2, FLOAT_OF_INT, "i", "f"),
    (2, [jnp.where], "bff", "f"),
    (1, [jnp.where], "bii", "i"),
    (3, FLOAT_READ, "cii", "f"),
    (2, INT_READ, "cii", "i"),
    (1, BOOL_READ, "cii", "b"),
]
ADDITIVE_ENDINGS = [
    lambda score, x, p: score + 0.5 * x,
    lambda score, x, p: 1.0 + (x * 1.5 + score),
    lambda score, x, p: (score - 0.75 * x) - 2.0,
    lambda score, x, p: score - (0.5 - x * -0.25),
]
ENDINGS = [
    lambda score, x, p: x,
    lambda score, x, p: x - score * 0.5,
    lambda score, x, p: score + x,
    lambda score, x, p: jnp.where(p, score + x, -jnp.inf),
    lambda score, x, p: jnp.where(p, score * x, -jnp.inf),
]


def random_functions(rng):
    """A score function, a mask function, and whether the score is only added to."""
    weights = np.array([step[0] for step in STEPS], float)
    drawn = []
    count = {"f": 1, "i": 4, "b": 1, "c": 1}
    for _ in range(rng.integers(4, 14)):
        _, makers, takes, gives = STEPS[rng.choice(len(STEPS), p=weights / weights.sum())]
        taken = [_recent(rng, count[kind]) for kind in takes]
        drawn.append((makers[rng.integers(len(makers))], takes, taken, gives))
        count[gives] += 1
    is_additive = rng.random() < 0.25
    endings = ADDITIVE_ENDINGS if is_additive else ENDINGS
    ending = endings[rng.integers(len(endings))]

    def values(first, index, captured):
        at = {"f": [first], "i": [*index], "b": [index[2] >= index[3]], "c": [captured]}
        for maker, takes, taken, gives in drawn:
            at[gives].append(maker(*(at[kind][i] for kind, i in zip(takes, taken, strict=True))))
        return at

    def score_mod(score, *rest):
        index, captured = rest[:4], rest[4:]
        at = values(captured[0][index[1]] if is_additive else score, index, captured)
        return ending(score, at["f"][-1] + 0.25 * at["f"][-len(at["f"]) // 2], at["b"][-1])

    def mask_mod(*rest):
        index, captured = rest[:4], rest[4:]
        return values(captured[0][index[1]], index, captured)["b"][-1]

    return score_mod, mask_mod, is_additive


def _recent(rng, count):
    """A value's number; later ones are likelier, so that values build on each other."""
    return int(count - 1 - min(rng.geometric(0.4) - 1, count - 1))
