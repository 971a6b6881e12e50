"""The call under JAX's transformations, on the CPU: each gives what plain calls give."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa3 import dot_product_attention
from transforms import (
    assert_near,
    attend,
    gradient,
    jitted,
    loss,
    operands,
    score,
    stacked_operands,
)

NAMED = jax.checkpoint_policies.save_only_these_names("context")


def one_by_one(function, in_axes, stacked, size):
    """What vmap must equal: a loop and a stack."""
    results = []
    for i in range(size):
        x = [
            a if axis is None else np.take(a, i, axis)
            for a, axis in zip(stacked, in_axes, strict=True)
        ]
        results.append(function(*x))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *results)


def mapped_operands(axes):
    """Operands for vmap with these in_axes: three calls, or one shared by all where None."""
    return [
        one if axis is None else np.moveaxis(three, 0, axis)
        for one, three, axis in zip(operands(), stacked_operands(3), axes, strict=True)
    ]


def test_jit_equals_eager():
    x = operands()
    assert_near(jitted(attend)(*x), attend(*x))
    assert_near(jitted(gradient)(*x), gradient(*x))


def test_vjp_equals_grad():
    x = operands()
    results, vjp = jax.vjp(lambda *qkv: attend(*qkv, *x[3:]), *x[:3])
    assert_near(vjp(jax.grad(score, argnums=(0, 1))(*results)), jitted(gradient)(*x))


def test_dtypes_are_kept():
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*operands())
    assert value.dtype == jnp.float32
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 3


SUBSETS = [subset for size in (1, 2, 5, 6) for subset in itertools.combinations(range(6), size)]


@pytest.mark.parametrize("mapped", SUBSETS[:6] + SUBSETS[6::3])
def test_vmap_over_any_subset(mapped):
    """Operands 0..5: query, key, value, query lengths, key lengths, offsets."""
    axes = tuple(0 if i in mapped else None for i in range(6))
    x = mapped_operands(axes)
    assert_near(jax.jit(jax.vmap(attend, in_axes=axes))(*x), one_by_one(jitted(attend), axes, x, 3))


@pytest.mark.parametrize(
    "axes",
    [(1, 1, 1, 1, 1, 1), (4, 0, 2, 0, 1, 0), (3, 4, 0, None, 1, None), (2, None, 3, 1, None, 0)],
)
def test_vmap_over_any_axis(axes):
    x = mapped_operands(axes)
    out, lse = jax.jit(jax.vmap(attend, in_axes=axes, out_axes=(2, 3)))(*x)
    assert_near(
        (np.moveaxis(out, 2, 0), np.moveaxis(lse, 3, 0)), one_by_one(jitted(attend), axes, x, 3)
    )


def test_vmap_supplies_the_batch():
    """3-D operands, of equal and of unequal axes."""
    query, key, value, *_ = operands()
    got = jax.vmap(lambda *x: dot_product_attention(*x, is_causal=True))(query, key, value)
    assert_near(got, dot_product_attention(query, key, value, is_causal=True))
    got = jax.vmap(lambda *x: dot_product_attention(*x), in_axes=(2, 1, 3))(
        np.moveaxis(query, 0, 2), np.moveaxis(key, 0, 1), np.moveaxis(value, 0, 3)
    )
    assert_near(got, dot_product_attention(query, key, value))


def test_vmap_over_heads():
    """A layer that maps a single-head function over heads."""
    query, key, value, *_ = operands()
    key, value = (np.repeat(a, 2, axis=2) for a in (key, value))

    def single(q, k, v):
        return dot_product_attention(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0]

    got = jax.vmap(single, in_axes=2, out_axes=2)(query, key, value)
    assert_near(got, dot_product_attention(query, key, value))


def test_vmap_over_heads_within_vmap_over_sequences():
    """As Equinox's layers map: one head of one sequence at a time, and gradients of the whole."""
    query, key, value, *_ = operands()
    key, value = (np.repeat(a, 2, axis=2) for a in (key, value))

    def head(q, k, v):  # [seqlen, head_dim]
        return dot_product_attention(*(a[:, None] for a in (q, k, v)), is_causal=True)[:, 0]

    mapped = jax.vmap(jax.vmap(head, in_axes=1, out_axes=1))

    def results(attention):
        out, vjp = jax.vjp(attention, query, key, value)
        return out, vjp(jnp.sin(3 * out))

    whole = functools.partial(dot_product_attention, is_causal=True)
    assert_near(jax.jit(lambda: results(mapped))(), jax.jit(lambda: results(whole))())


def test_vmap_of_size_zero():
    shape = (0, 2, 8, 2, 16)
    query = np.zeros(shape, "bfloat16")
    assert jax.vmap(dot_product_attention)(query, query, query).shape == shape
    gradient = jax.grad(lambda *x: total(jax.vmap(dot_product_attention)(*x)))
    assert gradient(query, query, query).shape == shape


@pytest.mark.parametrize(
    "axes",
    [
        (0,) * 6,
        (0, None, None, None, None, None),
        (None, 0, 0, None, 0, None),
        (1, 2, 3, 0, None, 0),
    ],
)
def test_vmap_of_grad(axes):
    x = mapped_operands(axes)
    assert_near(
        jax.jit(jax.vmap(gradient, in_axes=axes))(*x), one_by_one(jitted(gradient), axes, x, 3)
    )


@pytest.mark.parametrize(
    "axes", [(0,) * 6, (None, 0, 0, 0, None, None), (0, None, None, None, 0, 0)]
)
def test_grad_of_vmap(axes):
    x = mapped_operands(axes)

    def sum_of_losses(*x):
        return jnp.sum(jax.vmap(loss, in_axes=axes)(*x))

    want = one_by_one(jitted(gradient), axes, x, 3)
    want = [w.sum(0) if axis is None else w for w, axis in zip(want, axes, strict=False)]
    assert_near(jax.jit(jax.grad(sum_of_losses, argnums=(0, 1, 2)))(*x), want)


def test_vmap_of_vmap():
    x = [np.stack([a, a[::-1]], axis=1) for a in stacked_operands(3)]

    def flat(a):
        return a.reshape(6, *a.shape[2:])

    assert_near(
        jax.tree.map(flat, jax.jit(jax.vmap(jax.vmap(attend)))(*x)),
        jax.jit(jax.vmap(attend))(*map(flat, x)),
    )


@pytest.mark.parametrize(
    "policy",
    [None, NAMED, jax.checkpoint_policies.nothing_saveable],
    ids=["default", "context", "nothing"],
)
def test_remat_gives_the_same_gradient(policy):
    rematerialised = jax.grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 2))
    assert_near(jax.jit(rematerialised)(*operands()), jitted(gradient)(*operands()))


def test_remat_by_name_does_not_run_the_forward_again():
    def calls(policy):
        function = jax.value_and_grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 2))
        text = jax.jit(function).trace(*operands()).lower(lowering_platforms=("cuda",)).as_text()
        return text.count("@jax_fa3_forward"), text.count("@jax_fa3_backward")

    assert calls(NAMED) == (1, 1)
    assert calls(jax.checkpoint_policies.nothing_saveable) == (2, 1)


def test_output_and_lse_are_named_context():
    x = operands()

    def forward(*qkv):
        return jax.vjp(lambda *y: attend(*y, *x[3:]), *qkv)[0]

    assert str(jax.make_jaxpr(forward)(*x[:3])).count("name=context") == 2


def total(x):
    return jnp.sum(jnp.sin(x.astype(jnp.float32)))


def test_scan_over_layers():
    _, *index = operands()[2:]
    query, key, value = (a for a in stacked_operands(3)[:3])

    def layer(carry, key_value):
        return carry + attend(carry, *key_value, *index)[0], None

    def scanned(query, key, value):
        return total(jax.lax.scan(layer, query, (key, value))[0])

    def unrolled(query, key, value):
        for key_value in zip(key, value, strict=True):
            query, _ = layer(query, key_value)
        return total(query)

    x = (query[0], key, value)
    assert_near(
        jax.jit(jax.grad(scanned, argnums=(0, 1, 2)))(*x),
        jax.jit(jax.grad(unrolled, argnums=(0, 1, 2)))(*x),
    )


def test_scan_with_remat():
    x = operands()

    def layer(query, _):
        return query + attend(query, *x[1:])[0], None

    def gradient_through(layer):
        return jax.jit(jax.grad(lambda query: total(jax.lax.scan(layer, query, length=3)[0])))(x[0])

    assert_near(gradient_through(jax.checkpoint(layer, policy=NAMED)), gradient_through(layer))


def test_cond_and_loop():
    x = operands()
    got = jax.jit(lambda flag, *x: jax.lax.cond(flag, loss, lambda *x: 0.0, *x))(True, *x)
    assert_near(got, jitted(loss)(*x))
    got = jax.jit(lambda *x: jax.lax.fori_loop(0, 2, lambda _, q: attend(q, *x[1:])[0], x[0]))(*x)
    assert_near(got, attend(attend(*x)[0], *x[1:])[0])


def test_eval_shape():
    query = jax.ShapeDtypeStruct((3, 1 << 20, 8, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((3, 1 << 18, 2, 128), jnp.bfloat16)
    out, lse = jax.eval_shape(
        lambda *x: dot_product_attention(*x, return_residual=True), query, key, key
    )
    assert (out.shape, out.dtype) == (query.shape, jnp.bfloat16)
    assert (lse.shape, lse.dtype) == (query.shape[:3], jnp.float32)
    out = jax.eval_shape(lambda *x: dot_product_attention(*x), query, key, key)
    assert (out.shape, out.dtype) == (query.shape, jnp.bfloat16)


def test_residual_without_batch_and_in_float16():
    query, key, value = (a[0].astype("float16") for a in operands()[:3])
    out, lse = dot_product_attention(query, key, value, return_residual=True)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (
        (20, 4, 16),
        jnp.float16,
        (20, 4),
        jnp.float32,
    )


def test_array_likes_are_accepted():
    query, key, value = (a.astype(np.float32) for a in operands()[:3])
    got = dot_product_attention(*(a.tolist() for a in (query, key, value)), is_causal=True)
    assert_near(got, dot_product_attention(query, key, value, is_causal=True))


def test_second_derivatives_of_the_kernels_are_refused():
    x = operands()
    with pytest.raises(NotImplementedError, match="implementation='xla'"):
        jax.jit(jax.grad(lambda q: total(gradient(q, *x[1:])[0])))(x[0])
