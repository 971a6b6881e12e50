"""`combine`: parts put together, empty ones, gradients, over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_fa3 import combine
from meshes import compiled_for, mesh_of

PARTS, ROWS, HEADS, DIM = 3, 5, 2, 4


def parts(seed=0, empty=()):
    """outs and lses of which (part, row) pairs in `empty` see no key; their out is poison."""
    rng = np.random.default_rng(seed)
    outs = rng.standard_normal((PARTS, ROWS, HEADS, DIM)).astype(np.float32)
    lses = 3 * rng.standard_normal((PARTS, ROWS, HEADS)).astype(np.float32)
    for place in empty:
        outs[place], lses[place] = np.nan, -np.inf
    return outs, lses


def meaning(outs, lses):
    """In float64, with what is empty left out."""
    outs, lses = outs.astype(np.float64), lses.astype(np.float64)
    weights = np.exp(np.where(np.isneginf(lses), -np.inf, lses - 10))
    total = weights.sum(0)
    weighed = (weights[..., None] * np.where(weights[..., None] == 0, 0, outs)).sum(0)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + 10
    return weighed / np.where(total == 0, 1, total)[..., None], lse


EMPTY = ((0, 0), (1, 0), (0, 1), (1, 1), (2, 1), (2, 2))  # row 1 sees no key at all


def loss(outs, lses, **options):
    out, lse = combine(outs, lses, **options)
    return (out * jnp.arange(1, DIM + 1)).sum() + jnp.where(lse == -jnp.inf, 0, 2 * lse).sum()


def test_parts_and_their_gradients():
    """Rows that are empty in some or all parts have finite gradients, 0 where they are empty."""
    outs, lses = parts(empty=EMPTY)
    (out, lse), gradients = compiled_for(
        lambda *x: (combine(*x), jax.grad(loss, (0, 1))(*x)), outs, lses
    )(outs, lses)
    want, want_lse = meaning(outs, lses)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-6)
    assert not np.any(out[1]) and np.isneginf(lse[1]).all()
    is_empty = np.isneginf(lses)
    for x in gradients:
        assert np.isfinite(x).all() and not np.any(x[is_empty])
    exact = functools.partial(numeric, outs, lses)
    for place in ((2, 0, 1), (0, 2, 0), (1, 3, 1)):
        np.testing.assert_allclose(gradients[1][place], exact(place), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(
            gradients[0][place],
            np.arange(1, DIM + 1) * np.exp(lses[place] - want_lse[place[1:]]),
            rtol=1e-5,
        )


def numeric(outs, lses, place, step=1e-4):
    """The derivative of the loss by one log-sum-exp, in float64."""

    def at(change):
        moved = lses.astype(np.float64)
        moved[place] += change
        out, lse = meaning(outs, moved)
        return (out * np.arange(1, DIM + 1)).sum() + 2 * lse[np.isfinite(lse)].sum()

    return (at(step) - at(-step)) / (2 * step)


def test_one_part_is_itself():
    """Bit for bit, beside empty ones too, at any height of its log-sum-exp."""
    outs, lses = parts(empty=[(1,), (2,)])
    for height in (-1e30, -1e5, 0, 1e5):
        lses[0] = height + 0.7
        out, lse = combine(outs, lses)
        np.testing.assert_array_equal(out, outs[0])
        np.testing.assert_array_equal(lse, lses[0])


def test_over_devices():
    """Over a mesh axis alone, and over a dimension and a mesh axis at once, with gradients."""
    outs, lses = parts(empty=EMPTY)
    outs, lses = (np.concatenate([x, x[::-1], x[:2]]) for x in (outs, lses))  # 8 parts
    mesh = mesh_of(x=4)

    def spread(outs, lses, of_two):
        if of_two:
            return combine(outs, lses, axis=0, axis_name="x")
        return combine(*combine(outs, lses), axis_name="x")

    def run(outs, lses):
        results = []
        for of_two in (False, True):
            each = functools.partial(spread, of_two=of_two)
            mapped = jax.shard_map(each, mesh=mesh, in_specs=P("x"), out_specs=P())

            def total(*x, mapped=mapped):
                out, lse = mapped(*x)
                return (out * jnp.arange(1, DIM + 1)).sum() + jnp.where(
                    lse == -jnp.inf, 0, 2 * lse
                ).sum()

            results.append((mapped(outs, lses), jax.grad(total, (0, 1))(outs, lses)))
        results.append((combine(outs, lses), jax.grad(loss, (0, 1))(outs, lses)))
        return results

    *over, alone = compiled_for(run, outs, lses)(outs, lses)
    for got in over:
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_other_axes_and_dtypes():
    outs, lses = parts()
    want = combine(outs, lses)
    got = combine(np.moveaxis(outs, 0, -2), np.moveaxis(lses, 0, -1), axis=-1)
    np.testing.assert_array_equal(got[0], want[0])
    out, lse = combine(outs.astype("bfloat16"), lses, out_dtype="bfloat16")
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(out.astype(np.float32), want[0], rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(lses=np.zeros((3, 5, 3))), ValueError, r"lses has shape \(3, 5, 3\); expected"),
        (dict(outs=np.zeros((3, 5, 2, 4), np.int32)), TypeError, "outs has dtype int32; expected"),
        (dict(axis=3), ValueError, "axis is 3; expected a dimension of lses"),
        (dict(axis=1.0), TypeError, "axis is 1.0; expected an int or None"),
        (dict(out_dtype="int8"), ValueError, "out_dtype is 'int8'; expected None or"),
        (dict(out_dtype="foo"), ValueError, "out_dtype is 'foo'; expected None or"),
        (dict(out_dtype=3), ValueError, "out_dtype is 3; expected None or"),
        (dict(outs=np.zeros((0, 2, 4)), lses=np.zeros((0, 2))), ValueError, "lses has no parts"),
        (
            dict(outs=np.ones(4), lses=np.ones(())),
            ValueError,
            r"outs has shape \(4,\)",
        ),
    ],
)
def test_errors(change, error, message):
    outs, lses = parts()
    with pytest.raises(error, match=message):
        combine(**dict(outs=outs, lses=lses) | change)
