"""flex_attention on the kernels: the library, tables, block masks and random functions, forward and
backward, each result in memory that was NaN before."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flex_checks import attend, check, check_random, inputs, run

from jax_fa3 import create_block_mask, flex, flex_attention

NUM_RANDOM, IN_A_TEST = 40, 2  # the campaign has more of them


BATCH, ROWS, KEYS, HEADS = 2, 333, 450, 4
GRID = np.ogrid[:BATCH, :HEADS, :ROWS, :KEYS]
SHAPES = [(BATCH, ROWS, KEYS, HEADS, 2, dim) for dim in (128, 64, 80)]


NAMES = "identity", "alibi", "softcap", "rough softcap", "table"
CASES = [(name, SHAPES[i % 2]) for i, name in enumerate(NAMES)] + [("identity", SHAPES[2])]


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_scores(name, shape):
    b, n, i, j = GRID
    table = np.random.default_rng(1).normal(size=(HEADS, 65)).astype(np.float32)
    score_mod, words = {
        "identity": (lambda s, *_: s, {}),
        "alibi": (
            flex.generate_alibi_bias(HEADS),
            dict(bias=2.0 ** (-8 * (n + 1) / HEADS) * (j - i)),
        ),
        "softcap": (flex.generate_tanh_softcap(2.0), dict(softcap=2.0)),
        "rough softcap": (flex.generate_tanh_softcap(2.0, approx=True), dict(softcap=2.0)),
        "table": (
            flex.generate_relative_position_bias(jnp.asarray(table)),
            dict(bias=table[n, np.clip(j - i, -32, 32) + 32]),
        ),
    }[name]
    arrays = inputs(shape)
    check(arrays, run(attend(score_mod), *arrays), **words)


SLOPES = np.array([0.02, -0.3, 1.0, 1.5], np.float32)  # of the heads; the last is too steep


@pytest.mark.parametrize(
    "sign", (None, 1, -1), ids="scores of both signs, above 0, below 0".split(", ")
)
@pytest.mark.parametrize(
    ("shape", "beside"),
    [
        ((BATCH, ROWS, KEYS, HEADS, 2, 128), "nothing"),
        ((BATCH, ROWS, KEYS, HEADS, 2, 64), "blocks and lengths"),
        ((1, 130, 3500, HEADS, 2, 128), "nothing"),  # logits up to 5000
    ],
    ids=str,
)
def test_slopes_along_keys(shape, beside, sign):
    """Keys on either side of a row, so that a tile's shift is above or below 0."""
    batch, rows, keys, *_ = shape
    _, n, i, j = np.ogrid[:batch, :HEADS, :rows, :keys]
    query, key, *others = inputs(shape, seed=7)
    if sign is not None:
        query, key = np.abs(query), np.abs(key) * jnp.bfloat16(sign)
    sees, options, words = True, {}, {}
    if beside == "blocks and lengths":
        seen = lambda b, h, q, k, *_: (k < q + 200) & (k % 7 != 3)  # noqa: E731
        lengths = np.array([400, 123], np.int32)
        used = np.arange(keys) < lengths[:, None]
        block_mask = create_block_mask(seen, None, None, rows, keys)
        options = dict(mask_mod=seen, block_mask=block_mask, key_value_seq_lengths=lengths)
        sees = (j < i + 200) & (j % 7 != 3) & used[:, None, None]
        words = dict(key_used=used)

    def along(score, b, h, q, k, slopes):
        return score + slopes[h] * (k - q)

    call = attend(along, captured=(jnp.asarray(SLOPES),), **options)
    arrays = query, key, *others
    check(arrays, run(call, *arrays), sees, bias=SLOPES[n] * (j - i), **words)


IDS = np.sort(np.random.default_rng(3).integers(0, 5, (BATCH, KEYS)))
DOCUMENTS = flex.generate_doc_mask_mod(jnp.asarray(IDS))
SAME = IDS[:, None, :ROWS, None] == IDS[:, None, None, :]


@pytest.mark.parametrize(
    ("shape", "beside", "blocks"),
    [
        *((SHAPES[0], beside, None) for beside in ("score", "window and lengths")),
        *((SHAPES[0], beside, 128) for beside in ("mask", "window and lengths")),
        (SHAPES[1], "score", (256, 128)),
        (SHAPES[2], "mask", 128),
    ],
    ids=str,
)
def test_documents(shape, beside, blocks):
    _, _, i, j = GRID
    block_mask = None
    if blocks is not None:
        block_mask = create_block_mask(DOCUMENTS, BATCH, None, ROWS, KEYS, block_size=blocks)
    sees, words, options, score_mod = SAME & (i >= j), {}, {}, None
    if beside == "score":
        score_mod, words = flex.generate_tanh_softcap(2.0), dict(softcap=2.0)
    if beside == "window and lengths":
        lengths = np.array([300, 123], np.int32)
        options = dict(local_window_size=(50, 9), key_value_seq_lengths=lengths)
        used = np.arange(KEYS) < lengths[:, None]
        sees = sees & (i - j <= 50) & (j - i <= 9) & used[:, None, None]
        words = dict(key_used=used)
    arrays = inputs(shape, seed=5)
    call = attend(score_mod, DOCUMENTS, block_mask=block_mask, **options)
    check(arrays, run(call, *arrays), sees, **words)


def test_blocks_of_another_function():
    """Whole blocks are seen and hidden ones are not, whatever the function says."""
    _, _, i, j = GRID
    block_mask = create_block_mask(flex.causal_mask, None, None, ROWS, KEYS)
    states = np.asarray(block_mask.states)[0, 0][i // 128, j // 128]
    arrays = inputs(SHAPES[0])
    odd = lambda b, h, q, k: (q + k) % 2 == 1  # noqa: E731
    call = attend(None, odd, block_mask=block_mask)
    sees = (states == 3) | ((states == 1) & ((i + j) % 2 == 1))
    check(arrays, run(call, *arrays), sees)


def test_numbers_of_mapped_calls():
    """jax.vmap over query counts the sequences of one mapped call."""
    arrays = inputs(SHAPES[0])
    by_batch = attend(lambda s, b, h, q, k: s * (1 + b) + h)
    mapped = jax.vmap(by_batch, (0, None, None))
    alone = run(by_batch, *arrays)
    query, key, value, dout, dlse = arrays
    twice = [np.stack([x, x]) for x in (query, dout, dlse)]
    out, lse, *_ = run(mapped, twice[0], key, value, *twice[1:])
    for i in range(2):
        np.testing.assert_array_equal(out[i], alone[0])
        np.testing.assert_array_equal(lse[i], alone[1])


@pytest.mark.parametrize("blocks", (False, True))
def test_deterministic_gradients(blocks, monkeypatch):
    flags = os.environ.get("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_gpu_deterministic_ops=true")
    block_mask = create_block_mask(DOCUMENTS, BATCH, None, ROWS, KEYS) if blocks else None
    arrays = inputs(SHAPES[0])
    score_mod = flex.generate_tanh_softcap(2.0)
    first, *others = (
        run(attend(score_mod, DOCUMENTS, block_mask=block_mask), *arrays) for _ in range(4)
    )
    check(arrays, first, SAME & (GRID[2] >= GRID[3]), softcap=2.0)
    for again in others:
        assert [x.tobytes() for x in again] == [x.tobytes() for x in first]


def test_gradient_of_a_captured_array():
    """Through XLA, after the forward kernel."""
    arrays = inputs(SHAPES[0])
    query, key, value, dout, _ = map(jnp.asarray, arrays)
    table = jnp.asarray(np.random.default_rng(1).normal(size=(HEADS, 65)), jnp.float32)

    def total(table, implementation):
        score_mod = flex.generate_relative_position_bias(table)
        out = flex_attention(query, key, value, score_mod, implementation=implementation)
        return jnp.sum((out * dout).astype(jnp.float32))

    got, want = (jax.jit(jax.grad(total), static_argnums=1)(table, x) for x in (None, "xla"))
    np.testing.assert_allclose(got, want, atol=0.02 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("first", range(0, NUM_RANDOM, IN_A_TEST))
def test_random_functions(first):
    assert any([check_random(number) for number in range(first, first + IN_A_TEST)])
