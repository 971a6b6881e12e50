"""Problems with a bias or a boolean mask: what `bias` measures."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.problems import UNTUNED, Problem, document_lengths

MODES = ("forward", "gradients", "gradients-no-dbias")
DOCUMENTS = "lognormal-1024"
BLOCK = 128  # rows and keys of a block of a sparse mask
KEPT = 0.25  # of its blocks, beside those of the diagonal
PAIR = dict(batch=384, seqlen=384, heads=4, head_dim=32)
RELATIVE = dict(batch=8, seqlen=2048, heads=16, head_dim=64)
LONG = dict(batch=4, seqlen=4096, heads=16, head_dim=128)


@dataclasses.dataclass(frozen=True)
class Dense(Problem):
    """A bias of the dimensions `bias` (letters as in `by_letter`), a mask of one of these kinds:

    "causal"         [1, 1, T, S], and "causal by sequence" the same for each: [B, 1, T, S]
    "padding"        [B, 1, 1, S]: keys up to lengths that are uniform from a quarter of S to S
    "documents"      [B, 1, T, S]: causal inside of documents with a mean of 1024
    "blocks"         [1, 1, T, S]: a quarter of the blocks of 128 x 128, and the diagonal
    "random"         [B, 1, T, S]: half of the pairs

    or both. Every row sees a key: peers differ where one does not.
    """

    name: str = ""
    kv_heads: int | None = None  # default: heads
    bias: str | None = None
    mask: str | None = None

    @property
    def label(self) -> str:
        heads = f"{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads else "")
        shape = f"d{self.head_dim}-s{self.seqlen}-b{self.batch}-h{heads}-{self.dtype}"
        return f"{self.name.replace(' ', '-')}-{shape}"

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.bias else MODES[:2]

    @property
    def pairs(self) -> float:
        return self.batch * self.seqlen**2 * _share_seen(self)

    def flops(self, mode: str) -> float:
        """Of the five products of the backward pass and the two of the forward pass before it."""
        return {"forward": 4}.get(mode, 14) * self.pairs * self.heads * self.head_dim

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        heads = (self.heads, self.kv_heads or self.heads, self.kv_heads or self.heads, self.heads)
        return [
            jax.ShapeDtypeStruct((self.batch, self.seqlen, h, self.head_dim), self.numpy_dtype)
            for h in heads
        ]

    def by_letter(self) -> dict[str, int]:
        return {"1": 1, "b": self.batch, "h": self.heads, "t": self.seqlen, "s": self.seqlen}

    def arrays(self) -> dict[str, jax.Array]:
        """The bias, of N(0, 1) values, and the mask."""
        arrays = {}
        if self.bias:
            shape = tuple(map(self.by_letter().__getitem__, self.bias))
            arrays["bias"] = jax.random.normal(jax.random.key(1), shape, self.numpy_dtype)
        if self.mask:
            arrays["mask"] = _mask(self)
        return arrays

    @property
    def lengths(self) -> np.ndarray:
        """int32 [batch], of a mask of padding."""
        lengths = np.random.default_rng(0).integers(self.seqlen // 4, self.seqlen + 1, self.batch)
        return lengths.astype(np.int32)

    @property
    def segment_ids(self) -> np.ndarray:
        """int32 [batch, seqlen], of a mask of documents: the same ones in another order each."""
        lengths = document_lengths(DOCUMENTS, self.seqlen)
        numbers = np.arange(1, len(lengths) + 1)
        orders = [np.random.default_rng(b).permutation(lengths) for b in range(self.batch)]
        return np.int32([np.repeat(numbers, order) for order in orders])

    @property
    def said(self) -> tuple[dict, dict] | None:
        """Options and arrays of dot_product_attention that hide the same keys without a mask."""
        return {
            None: ({}, {}),
            "causal": (dict(is_causal=True), {}),
            "causal by sequence": (dict(is_causal=True), {}),
            "padding": ({}, dict(key_value_seq_lengths=self.lengths)),
            "documents": (dict(is_causal=True), dict(query_segment_ids=self.segment_ids)),
        }.get(self.mask)

    def reference(self, inputs: list[jax.Array]) -> dict[bool, tuple]:
        """(output, gradients of query, key, value and bias) with the bias, and without."""
        arrays = self.arrays()
        bias, mask = arrays.get("bias"), arrays.get("mask")
        found = {True: _reference(*inputs, bias, mask)}
        return found | {False: _reference(*inputs, None, mask) if self.bias else found[True]}


def dense_problems() -> list[Dense]:
    """Those with a bias, then those with a mask alone; names are unique."""
    biases = (
        Dense(**PAIR, name="pair", bias="1hts"),
        Dense(**PAIR, name="pair and key mask", bias="1hts", mask="padding"),
        Dense(**RELATIVE, name="relative", bias="1hts"),
        Dense(4, 2048, 16, 128, name="full", bias="bhts"),
        Dense(32, 512, 12, 64, name="t5", bias="1hts"),
        Dense(2, 4096, 32, 128, name="grouped heads", kv_heads=8, bias="1hts"),
        Dense(8, 1024, 16, 64, name="keys", bias="b11s"),
    )
    kinds = ("causal", "causal by sequence", "padding", "documents", "blocks", "random")
    return [*biases, *(Dense(**LONG, name=kind, mask=kind) for kind in kinds)]


def largest_error(got, want) -> float:
    """The largest ||got - want|| / ||want|| of the arrays; NaN in got makes it NaN."""

    @jax.jit
    def error(x, y):
        return jnp.linalg.norm((x.astype(jnp.float32) - y).ravel()) / jnp.linalg.norm(y.ravel())

    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max((float(error(x, y)) for x, y in pairs), key=lambda e: (e != e, e))


def _mask(problem: Dense) -> jax.Array:
    """bool [B | 1, 1, T | 1, S]"""
    batch, seqlen, kind = problem.batch, problem.seqlen, problem.mask
    place = jnp.arange(seqlen)
    causal = place[:, None] >= place
    if kind == "causal":
        return causal[None, None]
    if kind == "causal by sequence":
        return jnp.broadcast_to(causal, (batch, 1, seqlen, seqlen))
    if kind == "padding":
        return (place < problem.lengths[:, None])[:, None, None]
    if kind == "documents":
        ids = problem.segment_ids
        return ((ids[:, :, None] == ids[:, None]) & causal)[:, None]
    random = jax.random.key(2)
    if kind == "blocks":
        count = -(-seqlen // BLOCK)
        kept = jax.random.bernoulli(random, KEPT, (count, count)) | jnp.eye(count, dtype=bool)
        return jnp.repeat(jnp.repeat(kept, BLOCK, 0), BLOCK, 1)[None, None, :seqlen, :seqlen]
    if kind == "random":
        pairs = jax.random.bernoulli(random, shape=(batch, 1, seqlen, seqlen))
        return pairs | jnp.eye(seqlen, dtype=bool)
    raise ValueError(f"mask is {kind!r}; expected one of those that Dense has")


@cache
def _share_seen(problem: Dense) -> float:
    """Of all pairs of a row and a key."""
    return float(_mask(problem).mean()) if problem.mask else 1.0


@partial(jax.jit, compiler_options=UNTUNED)
def _reference(query, key, value, dout, bias, mask):
    """jax.nn's output and gradients in float32 throughout, one sequence after the other."""

    def for_each(x):
        return None if x is None else jnp.broadcast_to(x, (len(query), *x.shape[1:]))

    def attend(query, key, value, bias):
        @jax.checkpoint
        def sequence(x):
            return jax.nn.dot_product_attention(*x, implementation="xla")

        return lax.map(sequence, (query, key, value, for_each(bias), for_each(mask)))

    with jax.default_matmul_precision("float32"):
        exact = (None if x is None else x.astype(jnp.float32) for x in (query, key, value, bias))
        out, pullback = jax.vjp(attend, *exact)
        return out, pullback(dout.astype(jnp.float32))
