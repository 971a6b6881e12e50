"""What is measured: attention problems, their inputs, their work, and a check of the answers."""

import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
QUICK_SEQLENS = (1024, 4096, 16384)
HEAD_DIMS = (128, 64, 256)  # the most used first: what a time budget cuts comes last
DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Self-attention of equal heads, arrays [batch, seqlen, heads, head_dim]."""

    batch: int
    seqlen: int
    heads: int
    head_dim: int
    causal: bool = False
    dtype: str = "bf16"

    @property
    def label(self) -> str:
        mask = "causal" if self.causal else "dense"
        return f"d{self.head_dim}-{mask}-s{self.seqlen}-b{self.batch}-h{self.heads}-{self.dtype}"

    @property
    def numpy_dtype(self) -> jnp.dtype:
        return jnp.dtype(DTYPES[self.dtype])

    def flops(self, mode: str) -> float:
        """The FlashAttention papers' count: a causal mask is half the work, backward 2.5 times."""
        pairs = self.batch * self.heads * self.seqlen**2 / (2 if self.causal else 1)
        return {"forward": 4, "backward": 10}[mode] * pairs * self.head_dim

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """query, key, value and the output's cotangent."""
        shape = (self.batch, self.seqlen, self.heads, self.head_dim)
        return [jax.ShapeDtypeStruct(shape, self.numpy_dtype)] * 4

    def inputs(self, seed: int = 0) -> list[jax.Array]:
        """N(0, 1) values for `shapes`.

        Drawn in float32: drawn in bfloat16 they are of 128 kinds, and what these lose in float8
        does not average out.
        """

        def draw(key, like):
            return jax.random.normal(key, like.shape).astype(like.dtype)

        @jax.jit
        def draw_all(key):
            return list(map(draw, jax.random.split(key, 4), self.shapes()))

        return draw_all(jax.random.key(seed))


def grid(
    tokens: int, hidden: int, seqlens: tuple[int, ...], dtype: str
) -> Iterator[tuple[Problem, str]]:
    """The FlashAttention-3 paper's grid: tokens and hidden size constant, (problem, mode)."""
    for head_dim, causal, mode in itertools.product(
        HEAD_DIMS, (False, True), ("forward", "backward")
    ):
        for seqlen in seqlens:
            shape = (max(1, tokens // seqlen), seqlen, max(1, hidden // head_dim), head_dim)
            yield Problem(*shape, causal, dtype), mode


# Not worth a search for the fastest GEMMs, which takes longer than they do.
UNTUNED = {"xla_gpu_autotune_level": 0}


@partial(jax.jit, static_argnames="causal", compiler_options=UNTUNED)
def reference(query, key, value, dout, causal: bool):
    """Output and gradients of the last head of the last batch row, in float32 throughout."""

    def attend(query, key, value):  # [seqlen, head_dim]
        scores = query @ key.T * query.shape[-1] ** -0.5
        if causal:
            scores = jnp.where(jnp.tri(*scores.shape, dtype=bool), scores, -jnp.inf)
        return jax.nn.softmax(scores, axis=-1) @ value

    with jax.default_matmul_precision("float32"):
        one = [x[-1, :, -1].astype(jnp.float32) for x in (query, key, value, dout)]
        out, pullback = jax.vjp(attend, *one[:3])
        return out, pullback(one[3])


def largest_error(got, want) -> float:
    """The largest ||got - want|| / ||want|| of the arrays; got's last head of the last row counts.

    NaN anywhere in got, other heads included, makes the answer NaN.
    """

    @jax.jit
    def error(x, y):
        poison = 0.0 * x.astype(jnp.float32).sum()
        return jnp.linalg.norm(x[-1, :, -1].astype(jnp.float32) - y) / jnp.linalg.norm(y) + poison

    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max((float(error(x, y)) for x, y in pairs), key=lambda e: (e != e, e))
