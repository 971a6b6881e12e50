"""Problems with a score function or a mask function: what `flex` measures."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3
from benchmarks.problems import Problem, document_lengths, reference
from jax_fa3 import flex

CAP = 30.0
REACH = 128  # distances of a table, on either side
BUCKETS = 32
WINDOW = 300
DOCUMENTS = 6  # in a sequence
SHORT = dict(batch=4, seqlen=4096, heads=16, head_dim=128)
LONG = SHORT | dict(batch=1, seqlen=16384)


class Score(NamedTuple):
    """function(heads, *captured) makes the score function; change(scores, head, row, column, heads,
    *captured) is the same of whole arrays, without jax_fa3. What is captured is a table."""

    function: Callable
    change: Callable
    table: Callable[[int], tuple[int, int]] | None = None  # its shape, by the number of heads
    is_added: bool = False  # the change does not depend on the scores


def _alibi(scores, head, row, column, heads):
    return scores + jnp.exp2(-8 * (head + 1) / heads) * (column - row)


def _relative(scores, head, row, column, heads, table):
    return scores + table[head, jnp.clip(column - row, -REACH, REACH) + REACH]


def _t5(scores, head, row, column, heads, table):
    """As T5 has it: half of the buckets for keys after the row, half of these for one distance."""
    quarter, distance = BUCKETS // 4, jnp.abs(column - row)
    growth = jnp.log2(jnp.maximum(distance, quarter) / quarter) / np.log2(REACH / quarter)
    far = jnp.minimum(quarter + (growth * quarter).astype(int), 2 * quarter - 1)
    bucket = jnp.where(distance < quarter, distance, far)
    return scores + table[jnp.where(column > row, 2 * quarter, 0) + bucket, head]


def _capped(scores, head, row, column, heads):
    return CAP * jnp.tanh(scores / CAP)


SCORES = {
    "identity": Score(lambda heads: lambda score, *_: score, lambda scores, *_: scores),
    "ALiBi": Score(flex.generate_alibi_bias, _alibi, is_added=True),
    "softcap": Score(lambda heads: flex.generate_tanh_softcap(CAP), _capped),
    "softcap approx": Score(lambda heads: flex.generate_tanh_softcap(CAP, approx=True), _capped),
    "table": Score(
        lambda heads, table: flex.generate_relative_position_bias(table), _relative,
        table=lambda heads: (heads, 2 * REACH + 1), is_added=True,
    ),
    "T5": Score(
        lambda heads, table: flex.generate_t5_bias(table, max_distance=REACH), _t5,
        table=lambda heads: (BUCKETS, heads), is_added=True,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Functional(Problem):
    """Attention with one of SCORES, or with a mask function and its block mask. Every sequence has
    the same documents."""

    name: str = ""
    score: str | None = None
    documents: tuple[int, ...] = ()  # their lengths; none: the sequence is one
    window: int | None = None  # how many keys before its own a row sees

    @property
    def label(self) -> str:
        return f"{self.name.replace(' ', '-')}-s{self.seqlen}-b{self.batch}-{self.dtype}"

    @property
    def has_blocks(self) -> bool:
        return self.score is None

    @property
    def changes_scores(self) -> bool:
        return self.score not in (None, "identity")

    @property
    def pairs(self) -> float:
        begin, end = self.intervals()
        return self.batch * float((end - begin).sum(dtype=np.int64))

    def intervals(self) -> tuple[np.ndarray, np.ndarray]:
        begin, end = super().intervals()
        if self.documents:
            begin = np.repeat(np.cumsum((0, *self.documents[:-1])), self.documents)
        if self.window is not None:
            begin = np.maximum(begin, end - 1 - self.window)
        return begin.astype(np.int32), end

    @property
    def segment_ids(self) -> np.ndarray:
        """int32 [seqlen], from 1 on."""
        return np.repeat(np.arange(1, len(self.documents) + 1, dtype=np.int32), self.documents)

    # ---- for flex_attention

    def functions(self, captured: tuple[jax.Array, ...]) -> tuple[Callable | None, ...]:
        """The score function and the mask function."""
        if self.score:
            return SCORES[self.score].function(self.heads, *captured), None
        if self.documents:
            return None, flex.generate_doc_mask_mod(*captured)
        if self.window is not None:
            return None, flex.generate_sliding_window(self.window)
        return None, flex.causal_mask

    def captured(self) -> tuple[jax.Array, ...]:
        if self.documents:
            return (jnp.asarray(self.segment_ids),)
        if self.score and SCORES[self.score].table:
            shape = SCORES[self.score].table(self.heads)
            return (jax.random.normal(jax.random.key(1), shape),)
        return ()

    def operands(self) -> tuple:
        """The captured arrays and the block mask, if it has one."""
        captured = self.captured()
        if not self.has_blocks:
            return captured, None
        _, mask = self.functions(captured)
        return captured, jax_fa3.create_block_mask(mask, None, None, self.seqlen, self.seqlen)

    # ---- for the others

    def masking(self) -> dict:
        window = None if self.window is None else (self.window, 0)
        return super().masking() | dict(local_window_size=window)

    def visibility(self) -> tuple[jax_fa3.Visibility, ...]:
        """Documents as dot_product_attention takes them."""
        if not self.documents:
            return ()
        shape = (self.batch, self.seqlen)
        return (jax_fa3.make_visibility(np.broadcast_to(self.segment_ids, shape)),)

    @property
    def has_mask(self) -> bool:
        """Whether is_causal does not say who sees whom."""
        return bool(self.documents) or self.window is not None

    def facts(self) -> tuple:
        """What a Score's `change` takes at the end."""
        return self.heads, *self.captured()

    def dense(self) -> tuple[jax.Array | None, ...]:
        """The bias [1, N, T, S] and the mask [1, 1, T, S], where it has such."""
        row, column = np.ogrid[: self.seqlen, : self.seqlen]
        if self.has_mask:
            begin, end = (x[:, None] for x in self.intervals())
            return None, jnp.asarray((begin <= column) & (column < end))[None, None]
        if not (self.score and SCORES[self.score].is_added):
            return None, None
        head = np.arange(self.heads)[:, None, None]
        bias = jax.jit(SCORES[self.score].change)(0.0, head, row, column, *self.facts())
        return bias[None], None

    def reference(self, inputs: list[jax.Array]) -> dict[bool, tuple]:
        """What `largest_error` compares a result with, with the score function and without."""
        found = {False: super().reference(inputs)}
        if not self.changes_scores:
            return found | {True: found[False]}
        change = SCORES[self.score].change
        changed = reference(*inputs, *self.intervals(), change, self.facts())
        return found | {True: changed}


def problems() -> Iterator[Functional]:
    """Those of most value first; name and seqlen tell them apart."""

    def scored(name, sizes):
        return Functional(**sizes, name=name, score=name)

    yield from (scored(name, SHORT) for name in SCORES if name != "T5")
    lengths = document_lengths(f"lognormal-{SHORT['seqlen'] // DOCUMENTS}", SHORT["seqlen"])
    yield Functional(**SHORT, name="documents", causal=True, documents=lengths)
    yield Functional(**SHORT, name="window", causal=True, window=WINDOW)
    yield Functional(**SHORT, name="causal", causal=True)
    yield scored("T5", SHORT)
    yield from (scored(name, LONG) for name in ("identity", "ALiBi", "softcap", "table"))
