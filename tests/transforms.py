"""What the tests of transformations and of sharding share: one call with every array operand.

It is in bfloat16, so that it takes the whole way through the package, with its rules for mapped and
sharded operands and its choice of the platform, down to the XLA implementation on the CPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from cases import Case
from jax_fa3 import dot_product_attention

CASE = Case(
    batch=2,
    seqlen_q=20,
    seqlen_k=24,
    heads_q=4,
    heads_kv=2,
    head_dim=16,
    causal=True,
    window=(9, 0),
    offset=(3, -2),
    query_lengths=(20, 11),
    key_lengths=(13, 24),
)
INDEX = ("query_seq_lengths", "key_value_seq_lengths", "query_offset")


def attend(query, key, value, query_lengths, key_lengths, offset, implementation=None):
    """Output and LSE of CASE's options; -inf made a number so that results can be subtracted."""
    out, lse = dot_product_attention(
        query,
        key,
        value,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        query_offset=offset,
        return_residual=True,
        implementation=implementation,
        **CASE.options,
    )
    return out, jnp.where(jnp.isneginf(lse), -1.0, lse)


def score(out, lse):
    """A sum over positions and devices alike whose cotangents differ everywhere."""
    return jnp.sum(jnp.sin(3 * out.astype(jnp.float32))) + jnp.sum(jnp.cos(lse))


def loss(*x):
    return score(*attend(*x))


gradient = jax.grad(loss, argnums=(0, 1, 2))
jitted = functools.cache(jax.jit)


def operands(seed=0):
    """The six operands of `attend`."""
    case = dataclasses.replace(CASE, scale=1.0 + seed)  # a case's name seeds its numbers
    return (*case.inputs()[:3], *(CASE.index_arrays[name] for name in INDEX))


def stacked_operands(size):
    """`size` different calls' operands along a new leading axis, the index arrays included."""
    stacked = [np.stack(column) for column in zip(*map(operands, range(size)), strict=True)]
    for array, values in zip(stacked[3:], ((20, 5, 0), (24, 1, 9), (0, 7, -9)), strict=True):
        array[:, 0] = values[:size]
    return stacked


def assert_near(got, want, relative=0.01):
    """Each leaf within `relative` of its counterpart by the Euclidean norm: room for roundings of
    bfloat16 that fall the other way, and for nothing else."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = (np.asarray(x, np.float32) for x in (g, w))
        assert g.shape == w.shape
        assert np.linalg.norm(g - w) <= relative * np.linalg.norm(w)
