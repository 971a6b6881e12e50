"""What is measured: attention problems, their inputs, their work, and a check of the answers."""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
QUICK_SEQLENS = (1024, 4096, 16384)
PADDED_SEQLENS = (1024, 2048, 4096)
HEAD_DIMS = (128, 64, 256)  # the most used first: what a time budget cuts comes last
DOCUMENTS = (  # see document_lengths; the first is the quick one
    "lognormal-1024", "lognormal-512", "lognormal-2048", "lognormal-4096", "equal-1024", "long-128",
)  # fmt: skip
PACKED_TOKENS = (16384, 65536)
PACKED_HEADS = {64: 16, 128: 16, 256: 8}
MODES = ("forward", "backward")
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

    @property
    def pairs(self) -> float:
        """Rows times the keys that each sees, of one head; a causal mask is half the work."""
        return self.batch * self.seqlen**2 / (2 if self.causal else 1)

    def flops(self, mode: str) -> float:
        """The FlashAttention papers' count: backward is 2.5 times forward."""
        return {"forward": 4, "backward": 10}[mode] * self.pairs * self.heads * self.head_dim

    def masking(self) -> dict:
        """The arguments that tell dot_product_attention which keys a row sees."""
        return dict(is_causal=self.causal)

    def intervals(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 [seqlen] each: the first key that a row of the last sequence sees, and the end."""
        rows = np.arange(self.seqlen, dtype=np.int32)
        return np.zeros_like(rows), rows + 1 if self.causal else np.full_like(rows, self.seqlen)

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

    def reference(self, inputs: list[jax.Array]):
        """What `largest_error` compares a result with: (output, gradients)."""
        return reference(*inputs, *self.intervals())


@cache
def document_lengths(documents: str, tokens: int) -> tuple[int, ...]:
    """Lengths that sum to `tokens`, from a fixed seed.

    "lognormal-1024": of sigma 1, as many as bring the mean nearest to 1024.
    "equal-1024": all 1024, the last one what remains.
    "long-128": one of half the tokens, then equal ones of 128.
    """
    kind, size = documents.split("-")
    size = int(size)
    if kind == "lognormal":
        count = max(1, round(tokens / size))
        weights = np.random.default_rng(0).lognormal(size=count)
        parts = weights.cumsum() / weights.cumsum()[-1]
        ends = (np.arange(1, count + 1) + (tokens - count) * parts).astype(int)  # none is empty
        return tuple(np.diff(ends, prepend=0).tolist())
    if kind == "long":
        return (tokens // 2, *document_lengths(f"equal-{size}", tokens - tokens // 2))
    if kind != "equal":
        raise ValueError(f"documents is {documents!r}; expected lognormal-, equal- or long-LENGTH")
    rest = tokens % size
    return (size,) * (tokens // size) + (rest,) * (rest > 0)


@dataclasses.dataclass(frozen=True)
class Packed(Problem):
    """Documents one after another in a sequence of a batch of one; each sees itself only."""

    documents: str = "lognormal-1024"

    @property
    def label(self) -> str:
        return f"{super().label}-{self.documents}"

    @property
    def lengths(self) -> tuple[int, ...]:
        return document_lengths(self.documents, self.seqlen)

    @property
    def cu_seqlens(self) -> np.ndarray:
        """int32 [documents + 1]: where each starts, and the end."""
        return np.cumsum((0, *self.lengths), dtype=np.int32)

    @property
    def segment_ids(self) -> np.ndarray:
        """int32 [1, seqlen], from 1 on."""
        ids = np.arange(1, len(self.lengths) + 1, dtype=np.int32)
        return np.repeat(ids, self.lengths)[None]

    @property
    def pairs(self) -> float:
        return float(sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths))

    def intervals(self) -> tuple[np.ndarray, np.ndarray]:
        starts = self.cu_seqlens
        begin, end = np.repeat(starts[:-1], self.lengths), np.repeat(starts[1:], self.lengths)
        return begin, np.arange(1, self.seqlen + 1, dtype=np.int32) if self.causal else end


@dataclasses.dataclass(frozen=True)
class Padded(Problem):
    """Sequences that end in padding; lengths are uniform from three quarters of seqlen to all."""

    full: bool = False  # every length is seqlen

    @property
    def label(self) -> str:
        return f"{super().label}-{'full' if self.full else 'padded'}"

    @property
    def lengths(self) -> np.ndarray:
        """int32 [batch]."""
        least = self.seqlen if self.full else 3 * self.seqlen // 4
        lengths = np.random.default_rng(0).integers(least, self.seqlen + 1, self.batch)
        return lengths.astype(np.int32)

    @property
    def pairs(self) -> float:
        return float(sum(int(n) ** 2 for n in self.lengths)) / (2 if self.causal else 1)

    def masking(self) -> dict:
        lengths = dict(query_seq_lengths=self.lengths, key_value_seq_lengths=self.lengths)
        return super().masking() | lengths

    def intervals(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of padding see nothing."""
        begin, end = super().intervals()
        length = self.lengths[-1]
        return begin, np.where(begin + np.arange(self.seqlen) < length, np.minimum(end, length), 0)


def grid(
    tokens: int, hidden: int, seqlens: tuple[int, ...], dtype: str
) -> Iterator[tuple[Problem, str]]:
    """The FlashAttention-3 paper's grid: tokens and hidden size constant, (problem, mode)."""
    for head_dim, causal, mode in product(HEAD_DIMS, (False, True), MODES):
        for seqlen in seqlens:
            shape = (max(1, tokens // seqlen), seqlen, max(1, hidden // head_dim), head_dim)
            yield Problem(*shape, causal, dtype), mode


def padded_grid(
    tokens: int, hidden: int, seqlens: tuple[int, ...], dtype: str
) -> Iterator[tuple[Padded, str]]:
    """Batches with and without padding, every row seeing all of its sequence: (problem, mode)."""
    for problem, mode in grid(tokens, hidden, seqlens, dtype):
        if not problem.causal:
            for full in (False, True):
                yield Padded(**vars(problem), full=full), mode


FOURTEEN = Packed(1, 16384, 16, 128, causal=True, documents="lognormal-1170")  # documents


def packed_grid(
    tokens: Iterable[int], head_dims: Iterable[int], documents: Iterable[str], dtype: str
) -> Iterator[tuple[Packed, str]]:
    """(problem, mode); the fourteen documents are first where they fit."""
    if (FOURTEEN.seqlen, FOURTEEN.head_dim, FOURTEEN.dtype) in product(tokens, head_dims, [dtype]):
        yield from ((FOURTEEN, mode) for mode in MODES)
    for head_dim, seqlen, kind, causal, mode in product(
        head_dims, tokens, documents, (True, False), MODES
    ):
        heads = PACKED_HEADS[head_dim]
        yield Packed(1, seqlen, heads, head_dim, causal, dtype, kind), mode


# Not worth a search for the fastest GEMMs, which takes longer than they do.
UNTUNED = {"xla_gpu_autotune_level": 0}


@partial(jax.jit, static_argnames="change", compiler_options=UNTUNED)
def reference(query, key, value, dout, begin, end, change=None, captured=()):
    """Output and gradients of the last head of the last batch row, in float32 throughout.

    change(scores, head, row, column, *captured) gives the scores of a row to use instead.
    """
    head = query.shape[2] - 1

    def attend(query, key, value):  # [seqlen, head_dim]
        @jax.checkpoint
        def row(x):
            query, begin, end, place = x
            column = jnp.arange(key.shape[0])
            seen = (begin <= column) & (column < end)
            scores = key @ query * query.shape[0] ** -0.5
            if change:
                scores = change(scores, head, place, column, *captured)
            scores = jnp.where(seen, scores, -1e30)
            return (jax.nn.softmax(scores) * seen) @ value  # 0 where nothing is seen

        rows = (query, begin, end, jnp.arange(query.shape[0]))
        return jax.lax.map(row, rows, batch_size=1024)

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
