"""Derivatives of every mode: as through jax.nn where the call is ordinary XLA code, and an error
that names the cure where it may run on the kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa3 import dot_product_attention
from jax_fa3.linear_map import linear_map

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


QUERY, KEY, VALUE = normal(2, 5, 4, 8), normal(2, 6, 2, 8), normal(2, 6, 2, 8)
BIAS = normal(4, 5, 6)
LENGTHS = np.array([6, 4], np.int32)
X = (QUERY, KEY, VALUE, BIAS)
TANGENTS = tuple(normal(*x.shape) for x in X)
MAPPED = np.stack([QUERY, QUERY + 1])


def attention(function, *x, **options):
    return function(*x, is_causal=True, key_value_seq_lengths=LENGTHS, **options)


def total(x):
    return jnp.sum(jnp.sin(x))


def of_query(call):
    return lambda query: call(query, *X[1:])


DERIVATIVES = {
    "jvp": lambda call: jax.jvp(call, X, TANGENTS),
    "jvp by one array": lambda call: jax.jvp(lambda v: call(QUERY, KEY, v), X[2:3], TANGENTS[2:3]),
    "transposed": lambda call: jax.linear_transpose(jax.linearize(call, *X)[1], *X)(QUERY),
    "jacfwd": lambda call: jax.jacfwd(call, 2)(*X),
    "hessian": lambda call: jax.hessian(lambda q: total(of_query(call)(q)))(QUERY),
    "grad of jvp": lambda call: jax.grad(
        lambda *x: total(jax.jvp(of_query(call), x, TANGENTS[:1])[1])
    )(QUERY),
    "vmap of jvp": lambda call: jax.vmap(
        lambda query: jax.jvp(of_query(call), (query,), TANGENTS[:1])[1]
    )(MAPPED),
    "vmap over tangents": lambda call: jax.vmap(
        lambda tangent: jax.jvp(of_query(call), X[:1], (tangent,))[1]
    )(MAPPED),
    "jvp of vmap": lambda call: jax.jvp(
        lambda query, bias: jax.vmap(lambda q: call(q, KEY, VALUE, bias))(query),
        (MAPPED, BIAS),
        (MAPPED, TANGENTS[3]),
    ),
    "grad of vmap": lambda call: jax.grad(
        lambda *x: total(jax.vmap(call, (0, None, None, None))(*x)), (0, 1, 3)
    )(MAPPED, *X[1:]),
    "vmap that maps nothing": lambda call: jax.vmap(
        lambda _: jax.jvp(of_query(call), X[:1], TANGENTS[:1])[1]
    )(np.zeros(2)),
    "remat in scan": lambda call: jax.jvp(
        lambda q: jax.lax.scan(lambda c, _: (jax.checkpoint(of_query(call))(c), None), q, None, 2)[
            0
        ],
        X[:1],
        TANGENTS[:1],
    ),
}


@pytest.fixture(scope="module")
def results():
    """{name: (ours, theirs)}, one program for each of the two functions."""

    def every(function):
        call = functools.partial(attention, function, implementation="xla")
        return {name: derivative(call) for name, derivative in DERIVATIVES.items()}

    ours, theirs = (
        jax.jit(functools.partial(every, function))()
        for function in (dot_product_attention, jax.nn.dot_product_attention)
    )
    return {name: (ours[name], theirs[name]) for name in DERIVATIVES}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_as_through_jax_nn(results, name):
    near(*results[name])


def near(ours, theirs):
    for mine, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(mine, other, rtol=2e-4, atol=2e-5)


def test_residual_and_its_tangent():
    """Against a difference of float32: jax.nn has no tangent of its residual."""

    def lse(query):
        return attention(dot_product_attention, query, KEY, VALUE, return_residual=True)[1][0]

    _, tangent = jax.jvp(lse, X[:1], TANGENTS[:1])
    step = 1e-2 * TANGENTS[0]
    near_by = (np.asarray(lse(QUERY + step)) - np.asarray(lse(QUERY - step))) / 2e-2
    np.testing.assert_allclose(tangent, near_by, atol=2e-3)


def test_where_no_kernel_takes_the_call():
    """float32 goes to XLA whatever the platform, so nothing has to be asked for; eagerly, too."""
    _, got = jax.jvp(lambda q: dot_product_attention(q, KEY, VALUE), X[:1], TANGENTS[:1])
    _, want = jax.jvp(lambda q: jax.nn.dot_product_attention(q, KEY, VALUE), X[:1], TANGENTS[:1])
    near(got, want)


SINKS = normal(4)
SCORES = dict(logits_soft_cap=1.5, return_residual=True, return_max_logits=True)
SLOPES = np.array([0.5, 0.25, 0.125, 0], np.float32)


def ours_with_sinks(query, value, sinks, lengths=LENGTHS):
    """(out, lse, max_logits)."""
    keep = dict(sinks=sinks, alibi_slopes=SLOPES, key_value_seq_lengths=lengths)
    x = query, KEY, value
    return dot_product_attention(*x, **keep, **SCORES, is_causal=True, implementation="xla")


def theirs_with_sinks(query, value, sinks, lengths=LENGTHS):
    """The same from the formulas, in dense arrays."""
    key, value = (jnp.repeat(x, 2, 2) for x in (KEY, value))
    row, column = np.arange(5)[:, None], np.arange(6)
    products = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision="highest") / np.sqrt(8)
    scores = products - SLOPES[:, None, None] * abs(row - column)
    sees = (column <= row) & (column < lengths[:, None, None, None])
    logits = jnp.where(sees, 1.5 * jnp.tanh(scores / 1.5), -np.inf)
    sums = (jnp.where(sees, jnp.exp(logits), 0)).sum(-1) + jnp.exp(sinks)[:, None]
    weights = jnp.where(sees, jnp.exp(logits), 0) / sums[..., None]
    out = jnp.einsum("bhqk,bkhe->bqhe", weights, value, precision="highest")
    lse = jnp.moveaxis(jnp.log(sums), 1, 2)
    return out, lse, jax.lax.stop_gradient(logits.max((2, 3)))


OF_SINKS = {
    "jvp": lambda call: jax.jvp(call, (QUERY, VALUE, SINKS), (TANGENTS[0], TANGENTS[2], SINKS + 1)),
    "jacfwd by sinks": lambda call: jax.jacfwd(lambda x: call(QUERY, VALUE, x)[:2])(SINKS),
    "grad": lambda call: jax.grad(lambda *x: sum(total(y) for y in call(*x)), (0, 1, 2))(
        QUERY, VALUE, SINKS
    ),
    "hessian by sinks": lambda call: jax.hessian(
        lambda x: sum(total(y) for y in call(QUERY, VALUE, x)[:2])
    )(SINKS),
    "hessian by value and sinks": lambda call: jax.jvp(
        jax.grad(lambda *x: sum(total(y) for y in call(QUERY, *x)[:2]), (0, 1)),
        (VALUE, SINKS),
        (TANGENTS[2], SINKS),
    ),
}


def test_sinks_slopes_caps_and_max_logits():
    def every(function):
        return {name: derivative(function) for name, derivative in OF_SINKS.items()}

    ours, theirs = (
        jax.jit(functools.partial(every, x))() for x in (ours_with_sinks, theirs_with_sinks)
    )
    for name in OF_SINKS:
        near(ours[name], theirs[name])
    assert not np.any(ours["jvp"][1][2])  # of max_logits


def test_derivatives_of_a_sink_of_minus_infinity():
    """Of rows that see keys as without a sink, of others 0."""
    sinks, lengths = np.array([-np.inf, 0, -np.inf, 1], np.float32), np.array([6, 0], np.int32)

    def both(query, sinks):
        return ours_with_sinks(query, VALUE, sinks, lengths)[:2]

    def derivatives(sinks):
        moved = jax.jvp(both, (QUERY, sinks), (TANGENTS[0], np.ones_like(SINKS)))[1]
        return moved, jax.hessian(lambda x: total(both(QUERY, x)[0]))(sinks)

    (out, lse), hessian = jax.jit(derivatives)(sinks)
    assert np.isfinite(out).all() and np.isfinite(hessian).all()
    np.testing.assert_array_equal(lse[1], np.broadcast_to([0, 1, 0, 1], (5, 4)))


def test_slopes_that_move():
    def call(slopes):
        return dot_product_attention(QUERY, KEY, VALUE, alibi_slopes=slopes, implementation="xla")

    with pytest.raises(NotImplementedError, match="alibi_slopes have no gradient"):
        jax.jvp(call, (SLOPES,), (SLOPES,))


@pytest.mark.parametrize("kind", ["explicit", "manual"])
def test_on_a_mesh(kind):
    explicit = kind == "explicit"
    types = (getattr(jax.sharding.AxisType, "Explicit" if explicit else "Auto"),)
    mesh = jax.make_mesh((2,), ("x",), axis_types=types)

    def call(q):
        return dot_product_attention(q, KEY, VALUE, implementation="xla")

    def local(q):
        return dot_product_attention(q, KEY[:1], VALUE[:1], implementation="xla")

    split = jax.P("x")
    over = call if explicit else jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split)
    q, dq = (np.stack([x[0]] * 2) for x in (QUERY, TANGENTS[0]))
    want = jax.jvp(
        call if explicit else lambda q: jnp.stack([local(x[None])[0] for x in q]), (q,), (dq,)
    )
    with jax.set_mesh(mesh):
        q, dq = (jax.device_put(x, jax.NamedSharding(mesh, split)) for x in (q, dq))
        near(jax.jit(lambda q, dq: jax.jvp(over, (q,), (dq,)))(q, dq), want)


HALF = tuple(x.astype("bfloat16") for x in X[:3])
REFUSED = {
    "kernels": dot_product_attention,
    "float8": functools.partial(dot_product_attention, forward_dtype="float8_e4m3fn"),
    "float8 through XLA": functools.partial(
        dot_product_attention, forward_dtype="float8_e4m3fn", implementation="xla"
    ),
    "strategy": functools.partial(
        dot_product_attention, sequence_parallel="ring", implementation="xla"
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("mode", ["jvp", "jacfwd", "linearize", "hessian"])
def test_refusal_names_the_cure(name, mode):
    def call(v):
        return REFUSED[name](HALF[0], HALF[1], v)

    derivative = {
        "jvp": lambda v: jax.jvp(call, (v,), (v,)),
        "jacfwd": jax.jacfwd(call),
        "linearize": lambda v: jax.linearize(call, v)[1](v),
        "hessian": jax.hessian(lambda v: call(v).astype(jnp.float32).sum()),
    }[mode]
    with pytest.raises(NotImplementedError, match="jvp, jacfwd.*pass implementation='xla'"):
        derivative(HALF[2])


def test_gradients_of_what_mapped_calls_share_are_summed_in_float32():
    """512 of 1; in bfloat16 256 + 1 is 256."""

    @jax.custom_jvp
    def identity(x, y):
        return x

    @identity.defjvp
    def rule(primals, tangents):
        return primals[0], linear_map(lambda _, t: t, lambda _, t: t, (), *tangents[:1] * 2)

    def loss(x):
        each = jax.vmap(identity, (None, 0), axis_size=512)(x, jnp.zeros(512, x.dtype))
        return (each.astype(jnp.float32) + jnp.zeros(512)).sum()

    assert jax.grad(loss)(jnp.ones((), "bfloat16")) == 512
