"""Checks of flex_attention on the kernels with the oracle, also for drawn functions, of which the
campaign has more than the suite."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from kernels import spoil_free_memory

import flex_functions
import oracle
import tolerance
from jax_fa3 import flex_attention


def inputs(shape, seed=0):
    """query, key, value, dout and dlse, of (batch, rows, keys, heads, kv heads, head_dim)."""
    batch, rows, keys, heads, kv_heads, dim = shape
    rng = np.random.default_rng(seed)
    shapes = [(batch, rows, heads, dim), *[(batch, keys, kv_heads, dim)] * 2]
    arrays = [rng.normal(size=x).astype(jnp.bfloat16) for x in (*shapes, shapes[0])]
    return *arrays, rng.normal(size=(batch, rows, heads)).astype(np.float32)


def run(call, query, key, value, dout, dlse):
    """Output, LSE and the gradients of query, key and value."""

    def both(query, key, value, dout, dlse):
        results, vjp = jax.vjp(call, query, key, value)
        return *results, *vjp((dout, dlse))

    arrays = jax.tree.map(jnp.asarray, (query, key, value, dout, dlse))
    executable = jax.jit(both).lower(*arrays).compile()
    results = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(executable.out_info)]
    spoil_free_memory([*results, executable.memory_analysis().temp_size_in_bytes])
    return jax.tree.map(np.asarray, executable(*arrays))


def check(arrays, got, sees=True, **words):
    """The results with the oracle's, in the tolerance of what rounds where the kernels do."""
    query, key, *_ = arrays
    batch, rows, heads, dim = query.shape
    known = dict(
        sees=np.broadcast_to(sees, (batch, heads, rows, key.shape[1])),
        query_used=np.ones((batch, rows), bool),
        key_used=np.ones(key.shape[:2], bool),
        scale=dim**-0.5,
    )
    exact, same = (
        oracle.attention(*arrays, precision=x, **known | words) for x in ("exact", query.dtype.name)
    )
    for name, x in zip(("out", "lse", "dquery", "dkey", "dvalue"), got, strict=True):
        tolerance.check(name, x, getattr(exact, name), getattr(same, name))


def attend(score_mod, mask_mod=None, captured=(), **options):
    return lambda *x: flex_attention(
        *x,
        score_mod,
        mask_mod,
        captured,
        return_residual=True,
        implementation="fa3",
        **options,
    )


@functools.cache
def captured_arrays():
    rng = np.random.default_rng(2026)
    return tuple(map(jnp.asarray, flex_functions.captured_arrays(rng)))


def over_pairs(function, *scores):
    """A function of a score, if there is one, and four indices for all pairs, [B, N, T, S]. Numbers
    are rounded to narrow types where the function says so, as in a kernel."""
    n = flex_functions
    shape = n.BATCH, n.HEADS, n.ROWS, n.KEYS
    given = [jnp.asarray(x, jnp.float32).ravel() for x in scores]
    call = jax.jit(jax.vmap(function), compiler_options={"xla_allow_excess_precision": False})
    flat = call(*given, *np.indices(shape, np.int32).reshape(4, -1))
    return jax.tree.map(lambda x: np.asarray(x).reshape(shape), flat)


def is_decided(change, scores):
    """Whether no comparison or rounding in a function depends on the scores' last bits."""
    here = change(scores)
    for sign in (-1, 1):
        near = change(scores + sign * 4e-6 * (1 + np.abs(scores)))
        pairs = zip(here, near, strict=True)
        if not all(np.all(np.abs(x - y) <= 0.01 * (1 + np.abs(x))) for x, y in pairs):
            return False
    return True


def check_random(number):
    """A drawn function, forward and backward, with float64. False where it says nothing: it reads
    more arrays than kernels take, with those that it closes over, or a wrong result hangs on a
    score's last bits."""
    n, captured = flex_functions, captured_arrays()
    score_mod, mask_mod, _ = n.random_functions(np.random.default_rng(number))
    arrays = inputs((n.BATCH, n.ROWS, n.KEYS, n.HEADS, 2, (64, 128)[number % 2]), seed=number)
    sees = over_pairs(lambda *x: mask_mod(*x, *captured))
    all_scores = []

    def change(scores):
        """The changed scores and their derivatives, [B, N, T, S]."""

        def with_slope(s, *x):
            return jax.jvp(lambda s: score_mod(s, *x, *captured), (s,), (jnp.ones_like(s),))

        all_scores.append(scores)
        scores, slope = (x.astype(np.float64) for x in over_pairs(with_slope, scores))
        return scores, np.where(np.isfinite(slope), slope, 0)  # of hidden pairs

    try:
        got = run(attend(score_mod, mask_mod, captured), *arrays)
    except NotImplementedError as error:
        assert re.search(r"read \d+ captured arrays; at most 8", str(error))
        return False
    try:
        check(arrays, got, sees, change=change)
    except AssertionError:
        if is_decided(change, all_scores[0]):
            raise
        return False
    return True
