"""Equal bits, a thousand times over, while other work keeps the GPU's multiprocessors busy."""

import functools
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from kernels import HEAD_DIM_PAIRS, bits

import transforms
from jax_fa3 import dot_product_attention

REPEATS = 1_000
HEADS = ((4, 4), (8, 2), (4, 1))
RANDOM = np.random.default_rng(0)


def documents(seqlen):
    """int32 [2, seqlen]: three documents and padding."""
    ids = np.repeat([3, 1, 2, 0], (300, 150, seqlen - 499, 49)).astype(np.int32)
    return np.stack([ids] * 2)


def masks(seqlen):
    return (
        dict(),
        dict(is_causal=True),
        dict(local_window_size=(150, 70)),
        dict(is_causal=True, query_segment_ids=documents(seqlen)),
    )


PAIRS = RANDOM.standard_normal((1, 1, 900, 900), np.float32).astype("bfloat16")
# dbias: a sum over all heads
WITH_BIAS = dict(bias=PAIRS, mask=RANDOM.random((2, 1, 900, 900)) < 0.5)


@pytest.fixture(scope="module")
def load():
    """Kernels of uneven sizes on a stream of their own, for as long as the tests run."""
    torch = pytest.importorskip("torch")
    stop = threading.Event()

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            sides = [
                torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for n in (384, 1024, 2048)
            ]
            while not stop.is_set():
                for x in sides:
                    (x @ x).relu_()
                torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join()


def inputs(seed, batch, seqlen, heads_q, heads_kv, head_dim, head_dim_v):
    """query, key, value and the cotangent of out."""
    heads = (heads_q, heads_kv, heads_kv, heads_q)
    dims = (head_dim, head_dim, head_dim_v, head_dim_v)
    return [
        jax.random.normal(key, (batch, seqlen, *shape), jnp.bfloat16)
        for key, *shape in zip(jax.random.split(jax.random.key(seed), 4), heads, dims, strict=True)
    ]


def attention(query, key, value, dout, bias=None, **options):
    """out, lse and the gradients."""
    call = functools.partial(dot_product_attention, return_residual=True, **options)
    (out, lse), vjp = jax.vjp(call, query, key, value, bias)
    return out, lse, *vjp((dout, jnp.sin(lse)))


def differing(functions, operands, repeats):
    """How many of `repeats` further calls of each function return other bits than its first."""
    words = {2: jnp.uint16, 4: jnp.uint32}

    def call_all(operands):
        results = [function(*x) for function, x in zip(functions, operands, strict=True)]
        return jax.tree.map(lambda x: lax.bitcast_convert_type(x, words[x.dtype.itemsize]), results)

    def step(carry, _):
        operands, first, counts = carry
        results = call_all(operands)
        differs = jnp.stack(
            [
                jnp.any(
                    jnp.stack(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.any(x != y), *pair)))
                )
                for pair in zip(first, results, strict=True)
            ]
        )
        # Operands that come out of the turn before: nothing can be taken out of the loop.
        operands, results = lax.optimization_barrier((operands, results))
        return (operands, first, counts + differs), None

    counts = jnp.zeros(len(functions), jnp.int32)
    carry = (operands, call_all(operands), counts)
    return lax.scan(step, carry, length=repeats)[0][2]


# One such load at a time, with pytest -n N --dist loadgroup: it takes the GPU from all workers.
@pytest.mark.xdist_group("load")
@pytest.mark.parametrize(("head_dim", "head_dim_v"), HEAD_DIM_PAIRS)
def test_a_thousand_repeats_under_load(load, head_dim, head_dim_v):
    """Deterministic gradients, and every forward result, of all kinds of heads and masks."""
    check_repeats(itertools.product(HEADS, (*masks(900), WITH_BIAS)), 900, head_dim, head_dim_v)


@pytest.mark.xdist_group("load")
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_a_thousand_repeats_of_sums_on_a_grid(load, head_dim):
    """From 1024 keys on, blocks of keys add to dQ in any order."""
    check_repeats(itertools.product(HEADS[1:], masks(1100)), 1100, head_dim, head_dim)


def check_repeats(combinations, seqlen, head_dim, head_dim_v):
    combinations = list(combinations)
    functions = [
        functools.partial(attention, deterministic=True, **mask) for _, mask in combinations
    ]
    operands = [
        inputs(i, 2, seqlen, *heads, head_dim, head_dim_v)
        for i, (heads, _) in enumerate(combinations)
    ]
    counts = jax.jit(functools.partial(differing, functions, repeats=REPEATS))(operands)
    assert np.asarray(counts).tolist() == [0] * len(combinations)


def test_a_difference_is_seen():
    """The comparison above counts a single bit that changes in a single turn."""
    turns = itertools.count()

    def flip(x):
        turn = jax.pure_callback(
            lambda _: np.int32(next(turns)), jax.ShapeDtypeStruct((), jnp.int32), x
        )
        return jnp.where(jnp.arange(x.size) == 5, x + (turn == 7), x)

    operands = [[jnp.zeros(9, jnp.float32)]] * 2
    functions = [lambda x: x, flip]
    counts = jax.jit(functools.partial(differing, functions, repeats=20))(operands)
    assert np.asarray(counts).tolist() == [0, 1]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("seqlen", "heads", "causal"),
    [
        (20_000, 2, False),  # more key blocks than SMs
        (8_192, 4, False),  # several heads' key blocks under way together, each head's in a circle
        (8_192, 4, True),
        (1_000, 40, False),
    ],
)
def test_many_key_blocks(head_dim, seqlen, heads, causal):
    """Equal bits each time, on fewer multiprocessors too, near those of the other kernels."""
    x = inputs(seqlen + head_dim, 1, seqlen, heads, heads // 2, head_dim, head_dim)

    def run(deterministic=True, sm_margin=0):
        call = functools.partial(
            attention, is_causal=causal, deterministic=deterministic, sm_margin=sm_margin
        )
        return jax.jit(call)(*x)

    want = run()
    for _ in range(10):
        assert bits(run()) == bits(want)
    transforms.assert_near(want, run(deterministic=False), relative=0.01)
    for sm_margin in (1, 57, 131):  # another order of key blocks, perhaps other tiles
        other = run(sm_margin=sm_margin)
        assert bits(run(sm_margin=sm_margin)) == bits(other)
        transforms.assert_near(want, other, relative=0.01)


def query_gradient(query, key, value, dout, **options):
    """dq, float32."""
    call = functools.partial(dot_product_attention, implementation="fa3", **options)

    def gradient(query, key, value, dout):
        return jax.vjp(call, query, key, value)[1](dout)[0].astype(jnp.float32)

    return np.asarray(jax.jit(gradient)(query, key, value, dout))


@pytest.mark.parametrize(("head_dim", "largest"), [(64, 1.875), (96, 1.25), (128, 1.875)])
def test_sums_that_reach_the_bound_of_their_grid(head_dim, largest):
    """Every key adds to dQ what it can at most: |dO| |V| |K| for a weight of 1. So sums come to
    0.94 of the power of two that the grid is made for, and are exact in any order."""
    keys, rows, heads = 4096, 1024, 2
    random = np.random.default_rng(head_dim)
    signs = np.repeat([1.0, -1.0], keys // 2)
    random.shuffle(signs)
    query = np.zeros((1, rows, heads, head_dim))  # equal weights
    direction = np.where(random.random(head_dim) < 0.5, 1.0, -1.0)
    value = np.tile(signs[:, None, None] * direction, (1, 1, heads, 1))
    key = np.tile(signs[:, None, None] * largest * np.ones(head_dim), (1, 1, heads, 1))
    dout = np.tile(direction, (1, rows, heads, 1))
    x = [jnp.asarray(a, jnp.bfloat16) for a in (query, key, value, dout)]
    want = np.full((1, rows, heads, head_dim), head_dim * largest)
    for sm_margin in (0, 1, 57, 131):
        got = query_gradient(*x, scale=1.0, deterministic=True, sm_margin=sm_margin)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_rows_of_a_grid_are_as_exact_as_their_own_gradients(head_dim):
    """Cotangents from 2^-20 to 2^20 beside each other; keys and values that nobody sees hold NaN
    and the largest numbers there are."""
    seqlen = 1800
    query, key, value, dout = inputs(head_dim, 2, seqlen, 4, 2, head_dim, head_dim)
    exponents = np.random.default_rng(head_dim).integers(-20, 21, (2, seqlen, 1, 1))
    dout = (dout * 2.0**exponents).astype(jnp.bfloat16)
    ids = documents(seqlen)
    hidden = (ids == 0)[..., None, None]
    options = dict(is_causal=True, query_segment_ids=ids)
    want = query_gradient(query, key, value, dout, **options)
    # A row that sees little else than one key has a gradient of little else than rounding.
    place = np.concatenate([np.arange(np.sum(ids[0] == i)) for i in (3, 1, 2, 0)])
    rows = (place >= 16) & (ids[0] != 0)
    for unseen in (np.nan, np.inf, 3e38, -3e38):
        spoiled = [jnp.where(hidden, jnp.bfloat16(unseen), x) for x in (key, value)]
        got = query_gradient(query, *spoiled, dout, deterministic=True, **options)
        assert np.isfinite(got).all()
        error, size = (np.linalg.norm(x[:, rows], axis=-1) for x in (got - want, want))
        np.testing.assert_array_less(error, 0.01 * size)
