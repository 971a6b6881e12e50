"""Greedy generation from a paged cache, with continuous batching.

Seats are sequences that run side by side. Every step gives each seat some new tokens, a piece of
its prompt or the token generated last, and appends their keys and values to its pages. A sequence
that ends leaves its seat and its pages to the next prompt in line. Two programs do all of it: steps
of one token, and steps of `chunk` tokens while a prompt is read.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_fa3
from decoder import Config, Decoder


class CachedLayers:
    """The attention of a step's layers, one after another, each with pages of its own."""

    def __init__(self, pages: list, tables: jax.Array, lengths: jax.Array, new: jax.Array):
        self.before, self.pages = iter(pages), []
        self.where = dict(block_tables=tables, cache_lengths=lengths, new_lengths=new)

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        out, *pages = jax_fa3.cached_attention(query, *next(self.before), key, value, **self.where)
        self.pages.append(tuple(pages))
        return out


def attention(query, key, value, *, is_causal: bool, layers: CachedLayers) -> jax.Array:
    """What the decoder calls in place of `dot_product_attention`; causal is the cache's default."""
    assert is_causal
    return layers.attend(query, key, value)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def step(graph, parameters, pages, tables, lengths, new, tokens) -> tuple[jax.Array, list]:
    """The greedy token behind the `new[b]` tokens [b, rows] of each seat, and the pages with them;
    the pages given are written to in place."""
    layers = CachedLayers(pages, tables, lengths, new)
    positions = lengths[:, None] + jnp.arange(tokens.shape[1])
    logits = nnx.merge(graph, parameters)(tokens, positions, layers=layers)
    last = jnp.maximum(new - 1, 0)[:, None, None]
    logits = jnp.take_along_axis(logits, last, 1)[:, 0]
    return logits.argmax(-1).astype(jnp.int32), layers.pages


@dataclasses.dataclass
class Sequence:
    """A prompt and what is generated of it: at most `limit` tokens."""

    number: int
    prompt: np.ndarray
    limit: int
    generated: list[int] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    length: int = 0  # tokens in the cache

    def next_tokens(self, most: int) -> np.ndarray:
        """Up to `most` tokens that the cache does not have yet."""
        if self.length < len(self.prompt):
            return self.prompt[self.length : self.length + most]
        return np.asarray(self.generated[-1:], np.int32)


@dataclasses.dataclass(frozen=True)
class Event:
    """A token as it is generated; with the last one the sequence gives back its pages."""

    sequence: Sequence
    token: int
    is_last: bool


class Generator:
    """Seats, their pages, and the two programs. `seconds` and `tokens` count steps whose program
    had been compiled before."""

    def __init__(
        self,
        config: Config,
        parameters,
        *,
        seats: int,
        num_pages: int,
        page_size: int = 16,
        pages_each: int = 64,
        chunk: int = 32,
    ):
        self.page_size, self.chunk = page_size, chunk
        self.parameters = parameters
        model = nnx.eval_shape(lambda: Decoder(config, attention, rngs=nnx.Rngs(0)))
        self.graph = nnx.graphdef(model)
        shape = (num_pages, page_size, config.num_heads_kv, config.head_dim)
        # NaN stands for whatever was there: free slots are never seen.
        self.pages = [
            tuple(jnp.full(shape, jnp.nan, config.dtype) for _ in "kv")
            for _ in range(config.num_layers)
        ]
        self.free = deque(range(num_pages))
        self.tables = np.zeros((seats, pages_each), np.int32)
        self.seats: list[Sequence | None] = [None] * seats
        self.compiled, self.seconds, self.tokens = set(), 0.0, 0

    def run(self, prompts: Iterable[tuple[np.ndarray, int]]) -> Iterator[Event]:
        """Generates from (prompt, limit) pairs; tokens as they come, of all seats."""
        waiting = deque(Sequence(i, *prompt) for i, prompt in enumerate(prompts))
        while waiting or any(self.seats):
            self._seat(waiting)
            yield from self._step()

    def _seat(self, waiting: deque[Sequence]) -> None:
        """Gives empty seats, and all pages that they may need, to the next in line."""
        for seat, taken in enumerate(self.seats):
            if taken or not waiting:
                continue
            sequence = waiting[0]
            count = -(-(len(sequence.prompt) + sequence.limit) // self.page_size)
            if count > self.tables.shape[1] or count > self.pages[0][0].shape[0]:
                raise ValueError(f"prompt {sequence.number} and its limit need {count} pages")
            if count > len(self.free):
                return  # until another sequence ends
            sequence.pages = [self.free.popleft() for _ in range(count)]
            self.tables[seat, :count] = sequence.pages
            self.seats[seat] = waiting.popleft()

    def _step(self) -> Iterator[Event]:
        fed = [x.next_tokens(self.chunk) if x else np.zeros(0, np.int32) for x in self.seats]
        new = np.array([len(x) for x in fed], np.int32)
        rows = 1 if new.max() == 1 else self.chunk
        tokens = np.zeros((len(fed), rows), np.int32)
        for seat, x in enumerate(fed):
            tokens[seat, : len(x)] = x
        lengths = np.array([x.length if x else 0 for x in self.seats], np.int32)
        start = time.perf_counter()
        best, self.pages = step(
            self.graph, self.parameters, self.pages, self.tables, lengths, new, tokens
        )
        best = np.asarray(best)
        is_timed = rows in self.compiled
        self.compiled.add(rows)
        self.seconds += is_timed * (time.perf_counter() - start)
        for seat, sequence in enumerate(self.seats):
            if sequence is None:
                continue
            sequence.length += int(new[seat])
            if sequence.length < len(sequence.prompt):
                continue
            sequence.generated.append(int(best[seat]))
            self.tokens += is_timed
            is_last = len(sequence.generated) == sequence.limit
            if is_last:
                self.free.extend(sequence.pages)
                self.seats[seat] = None
            yield Event(sequence, int(best[seat]), is_last)


def check_greedy(
    config: Config, parameters, sequences: Iterable[Sequence], margin: float
) -> list[str]:
    """Where the tokens are not those of the model without a cache, given the tokens before; where
    its best two logits are within `margin`, rounding may choose either."""
    model = nnx.eval_shape(lambda: Decoder(config, jax_fa3.dot_product_attention, rngs=nnx.Rngs(0)))
    graph = nnx.graphdef(model)
    texts = [np.concatenate([x.prompt, x.generated]).astype(np.int32) for x in sequences]
    longest = max(map(len, texts))
    apply = jax.jit(lambda parameters, tokens: nnx.merge(graph, parameters)(tokens))
    found = []
    for sequence, text in zip(sequences, texts, strict=True):
        padded = np.pad(text, (0, longest - len(text)))
        logits = np.asarray(apply(parameters, padded[None]))[0]
        for i, token in enumerate(sequence.generated):
            row = logits[len(sequence.prompt) + i - 1]
            if row.max() - row[token] > margin:
                found.append(
                    f"sequence {sequence.number}, token {i}: {token}; expected {row.argmax()}, "
                    f"as the model without a cache has it"
                )
    return found
