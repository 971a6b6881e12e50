"""The examples of docs/bias.md run, and mean what they say."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa3

PAGE = pathlib.Path(__file__).parents[1] / "docs/bias.md"


@pytest.fixture(scope="module")
def names():
    """What the page's programs leave behind, run one after the other."""
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    found = {}
    for program in programs:
        exec(program, found)
    return found


def test_complexes_are_mapped(names):
    """Each with a bias of its own."""
    keys = jax.random.split(jax.random.key(1), 5)
    n = 20
    qkv = [jax.random.normal(key, (3, n, n, 2, 16), jnp.bfloat16) for key in keys[:3]]
    bias = jax.random.normal(keys[3], (3, 2, n, n), jnp.bfloat16)
    keep = jax.random.bernoulli(keys[4], 0.9, (3, n, n))
    attend = names["triangle_attention"]
    got = jax.vmap(attend)(*qkv, bias, keep)
    for i in range(3):
        want = attend(*(x[i] for x in (*qkv, bias, keep)))
        np.testing.assert_array_equal(got[i], want)


def test_t5_buckets(names):
    """Up to 7 each distance has its own, farther ones share, and 16 more are for keys behind."""
    distance = jnp.array([0, 1, -1, 7, -7, 8, -8, 11, -12, 127, -127, 5000, -5000])
    want = [0, 17, 1, 23, 7, 24, 8, 24, 9, 31, 15, 31, 15]
    assert names["bucket"](distance).tolist() == want


def test_line_by_line(names):
    """The table's lines run, and those of masks that other words say agree with them."""
    batch, seqlen, heads = 2, 24, 4
    keys = jax.random.split(jax.random.key(2), 3)
    q, k, v = (jax.random.normal(key, (batch, seqlen, heads, 16), jnp.bfloat16) for key in keys)
    place = jnp.arange(seqlen)
    distance = -jnp.abs(place[:, None] - place).astype(jnp.float32)
    keep = place < jnp.array([[24], [13]])
    given = dict(
        attend=jax_fa3.dot_product_attention,
        jnp=jnp,
        q=q,
        k=k,
        v=v,
        table=jnp.ones((32, heads), jnp.bfloat16),
        buckets=names["bucket"](place - place[:, None]),
        slopes=jnp.array([0.5, 0.25, 0.125, 0.0625]),
        distance=distance,
        keep=keep,
        lengths=jnp.array([24, 13], jnp.int32),
    )
    lines = re.findall(r"^\| (.*?) \| `(attend\(.*?\))`.* \|$", PAGE.read_text(), re.MULTILINE)
    assert len(lines) == 9
    biases = {  # of these words; the others take none
        "a pair bias": jnp.zeros((heads, seqlen, seqlen), q.dtype),
        "one bias for each key": jnp.zeros((batch, seqlen), q.dtype),
    }
    causal = jnp.broadcast_to(place[:, None] >= place, (batch, seqlen, seqlen))
    results = {}
    for what, line in lines:
        bias = next((x for words, x in biases.items() if what.startswith(words)), None)
        more = dict(bias=bias, mask=causal, x=jnp.where(causal[:, None], 0, -1e9))
        results[what.split(" (")[0]] = eval(line, given | more)
    assert {x.shape for x in results.values()} == {(batch, seqlen, heads, 16)}
    for x, y in (
        ("a mask of row and key pairs", "a causal mask, alone or with other masks"),
        ("a mask of row and key pairs", "a float mask of 0 and a large negative number"),
        ("a mask of the keys", "padding at the end of each sequence"),
    ):
        np.testing.assert_array_equal(results[x], results[y])
