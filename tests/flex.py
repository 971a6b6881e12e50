"""Calls of flex_attention with what they mean by dense formulas, for the oracle."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import oracle
import tolerance
from jax_fa3 import flex, flex_attention
from meshes import run

BATCH, ROWS, KEYS, HEADS, KV_HEADS, DIM = 2, 40, 56, 4, 2, 16


@dataclasses.dataclass
class Meaning:
    """What a call's functions mean: words for oracle.attention, and which pairs are seen."""

    sees: Any = True  # broadcasts to [B, N, T, S]
    words: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Functions:
    """score_mod, mask_mod and what they mean; a table that they close over has a gradient."""

    score_mod: Callable | None = None
    mask_mod: Callable | None = None
    meaning: Meaning = dataclasses.field(default_factory=Meaning)


def grid():
    """Numbers of sequences, heads, rows and keys, [B, N, T, S] by broadcasting."""
    return np.ogrid[:BATCH, :HEADS, :ROWS, :KEYS]


def random(shape, seed, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def inputs(dtype, keys=KEYS):
    """query, key, value, dout and dlse."""
    shapes = [(BATCH, ROWS, HEADS, DIM), *[(BATCH, keys, KV_HEADS, DIM)] * 2]
    arrays = [random(shape, i, dtype) for i, shape in enumerate((*shapes, shapes[0]))]
    return *arrays, random((BATCH, ROWS, HEADS), 4)


def bucket_of(distance, buckets, bidirectional, max_distance):
    """T5's bucket of one distance, in Python's numbers."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
        length = abs(distance)
    else:
        length = max(-distance, 0)
    near = buckets // 2
    if length < near:
        return first + length
    steps = 0  # of the far buckets, those that end at or before this distance
    ratio = max_distance / near
    while steps < buckets - near - 1:
        end = near * ratio ** ((steps + 1) / (buckets - near))
        if length < end - 1e-9:
            break
        steps += 1
    return first + near + steps


def library():
    """{name: functions} of all of jax_fa3.flex, whose meaning is written down anew."""
    b, n, i, j = grid()
    distance = j - i
    window = (i >= j) & (i - j <= 9)
    prefix = np.array([5, 23])
    ids = np.random.default_rng(5).integers(0, 3, (BATCH, KEYS))
    same = ids[b, i] == ids[b, j]
    cap = dict(softcap=1.5)
    return {
        "noop": Functions(mask_mod=flex.noop_mask),
        "causal": Functions(mask_mod=flex.causal_mask, meaning=Meaning(i >= j)),
        "window": Functions(mask_mod=flex.generate_sliding_window(9), meaning=Meaning(window)),
        "prefix": Functions(
            mask_mod=flex.generate_prefix_lm_mask(prefix),
            meaning=Meaning((i >= j) | (j < prefix[b])),
        ),
        "prefix of all": Functions(
            mask_mod=flex.generate_prefix_lm_mask(7), meaning=Meaning((i >= j) | (j < 7))
        ),
        "documents": Functions(
            mask_mod=flex.generate_doc_mask_mod(ids), meaning=Meaning(same & (i >= j))
        ),
        "documents of all": Functions(
            mask_mod=flex.generate_doc_mask_mod(ids[0], flex.noop_mask),
            meaning=Meaning(ids[0][i] == ids[0][j]),
        ),
        "and, or": Functions(
            mask_mod=flex.or_masks(
                flex.and_masks(
                    flex.generate_sliding_window(9), lambda b, h, q, k, *_: (q + k) % 3 != h
                ),
                lambda b, h, q, k, *_: k == b,
            ),
            meaning=Meaning((window & ((i + j) % 3 != n)) | (j == b)),
        ),
        "alibi": Functions(
            flex.generate_alibi_bias(HEADS),
            meaning=Meaning(words=dict(bias=2.0 ** (-8 * (n + 1) / HEADS) * distance)),
        ),
        "softcap": Functions(
            flex.generate_tanh_softcap(1.5), flex.causal_mask, Meaning(i >= j, cap)
        ),
        "any": Functions(
            lambda score, b, h, q, k: jnp.where(
                (q * k) % 5 == h, jnp.sin(score) * (b + 1), score**2 / 4 - (k // 7).astype(float)
            ),
            meaning=Meaning(words=dict(change=_any)),
        ),
    }


def _any(scores):
    b, n, i, j = grid()
    first = (i * j) % 5 == n
    with np.errstate(invalid="ignore"):
        changed = np.where(first, np.sin(scores) * (b + 1), scores**2 / 4 - j // 7)
        return changed, np.where(first, np.cos(scores) * (b + 1), scores / 2)


def tables():
    """{name: (function of a table, its shape, dense bias of it [1, N, T, S])}"""
    _, n, i, j = grid()
    distance = j - i
    clipped = np.clip(distance, -6, 6) + 6

    def buckets(count, bidirectional, farthest):
        of_distance = np.vectorize(lambda d: bucket_of(d, count, bidirectional, farthest))
        return of_distance(distance)

    one_way = dict(bidirectional=False, max_distance=40)
    return {
        "relative": (
            flex.generate_relative_position_bias,
            (HEADS, 13),
            lambda table: table[n, clipped],
        ),
        "t5": (
            flex.generate_t5_bias,
            (32, HEADS),
            lambda table: table[buckets(32, True, 128), n],
        ),
        "t5 one way": (
            lambda table: flex.generate_t5_bias(table, **one_way),
            (8, HEADS),
            lambda table: table[buckets(8, False, 40), n],
        ),
    }


def results(call, query, key, value, dout, dlse, *tables):
    """Output, LSE and gradients, those of tables last; call(query, key, value, *tables)."""

    def both(dout, dlse, *x):
        primals, vjp = jax.vjp(call, *x)
        return *primals, *vjp((dout, dlse))

    return run(both, dout, dlse, query, key, value, *tables)


def expected(arrays, meaning, precision, **known):
    """The oracle's results, of one precision; `known`: which rows and keys are used."""
    query, key, *_ = arrays
    sees = np.broadcast_to(meaning.sees, (BATCH, HEADS, ROWS, key.shape[1]))
    words = dict(
        sees=sees,
        query_used=np.ones((BATCH, ROWS), bool),
        key_used=np.ones((BATCH, key.shape[1]), bool),
        scale=DIM**-0.5,
        precision=precision,
    )
    return oracle.attention(*arrays, **words | known | meaning.words)


def compare(got, arrays, meaning, **known):
    """The results of a call with the oracle's."""
    dtype = arrays[0].dtype
    exact, same = (expected(arrays, meaning, x, **known) for x in ("exact", dtype.name))
    names = "out", "lse", "dquery", "dkey", "dvalue"
    for name, x in zip(names, got, strict=False):
        tolerance.check(name, np.asarray(x), getattr(exact, name), getattr(same, name))
    return exact


def attend(functions, **options):
    """The call of `functions` with the LSE."""

    def call(*x):
        return flex_attention(
            *x,
            functions.score_mod,
            functions.mask_mod,
            return_residual=True,
            implementation="xla",
            **options,
        )

    return call
