"""Row intervals on the kernels: random problems of all kinds against the float64 oracle, in memory
that is spoilt, and what they must give bit by bit.

Each problem is a batch of several: its intervals differ from sequence to sequence, and all that is
static is one program.
"""

import dataclasses

import jax
import numpy as np
import pytest
from kernels import spoil_free_memory

import oracle
import tolerance
from jax_fa3 import dot_product_attention
from oracle import Results

HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (40, 72))
KINDS = ("documents", "gaps", "any", "one key", "prefix", "chunks", "by head")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A random call; everything follows from its number."""

    number: int
    batch = 8
    kinds = KINDS
    seqlens = (1, 460)
    most_edges = 9

    @property
    def random(self):
        return np.random.default_rng(self.number)

    @property
    def kind(self):
        return self.kinds[self.number % len(self.kinds)]

    @property
    def static(self):
        """Shapes and options."""
        random = self.random
        square = self.kind in ("documents", "gaps")
        seqlen_q, seqlen_k = random.integers(*self.seqlens, 2).tolist()
        heads_kv = int(random.integers(1, 3))
        return dict(
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_q if square else seqlen_k,
            heads=(heads_kv * int(random.integers(1, 3)), heads_kv),
            head_dims=HEAD_DIMS[self.number // len(self.kinds) % len(HEAD_DIMS)],
            dtype=("bfloat16", "float16")[int(random.integers(2))],
            is_causal=bool(random.integers(2)),
            window=(None, (int(random.integers(300)), int(random.integers(90))))[
                int(random.integers(2))
            ],
            offset=int(random.integers(-99, 99)) if random.integers(2) else 0,
            lengths=bool(random.integers(2)),
            deterministic=bool(random.integers(2)),
        )

    def intervals(self):
        """The arrays of the call, and begin and end of what each row sees, [B, heads or 1, Sq]."""
        random, static = self.random, self.static
        seqlen_q, seqlen_k = static["seqlen_q"], static["seqlen_k"]
        shape = (self.batch, seqlen_q)
        row = np.arange(seqlen_q)
        if self.kind in ("documents", "gaps"):
            ids = np.zeros(shape, np.int32)
            for sequence in ids:
                last = int(random.integers(seqlen_q // 2, seqlen_q + 1))
                ends = np.unique(
                    np.append(random.integers(0, last + 1, random.integers(self.most_edges)), last)
                )
                names = random.permutation(len(ends)) + 1
                for name, begin, end in zip(names, np.append(0, ends), ends, strict=False):
                    is_gap = self.kind == "gaps" and random.integers(3) == 0
                    sequence[begin:end] = 0 if is_gap else name
            same = (ids[:, :, None] == ids[:, None]) & (ids > 0)[:, :, None]
            begin, end = same.argmax(-1), seqlen_q - same[..., ::-1].argmax(-1)
            begin, end = (np.where(ids > 0, x, 0)[:, None] for x in (begin, end))
            return dict(query_segment_ids=ids), begin, end
        if self.kind == "any":
            begin, end = random.integers(-9, seqlen_k + 9, (2, *shape))
        elif self.kind == "one key":
            begin = random.integers(0, seqlen_k, shape)
            end = begin + 1
        elif self.kind == "prefix":
            begin = np.zeros(shape, np.int64)
            end = np.maximum(random.integers(0, seqlen_k + 1, (self.batch, 1)), row + 1)
        elif self.kind == "chunks":
            chunk = int(random.integers(1, 1 + seqlen_q // 2))
            begin = np.broadcast_to((row + static["offset"]) // chunk * chunk, shape)
            return dict(attention_chunk=chunk), begin[:, None], begin[:, None] + chunk
        else:
            heads = static["heads"][int(random.integers(2))]
            begin = np.sort(random.integers(0, seqlen_k + 1, (self.batch, heads, seqlen_q)), -1)
            end = np.minimum(
                begin + random.integers(0, seqlen_k + 1, (self.batch, heads, 1)), seqlen_k
            )
            return _given(begin, end), begin, end
        return _given(begin, end), begin[:, None], end[:, None]

    def arrays(self):
        """query, key, value, dout, dlse."""
        random, static = self.random, self.static
        (heads, heads_kv), (dim, dim_v) = static["heads"], static["head_dims"]
        sq, sk = static["seqlen_q"], static["seqlen_k"]
        shapes = ((sq, heads, dim), (sk, heads_kv, dim), (sk, heads_kv, dim_v), (sq, heads, dim_v))
        arrays = [random.normal(size=(self.batch, *x)).astype(static["dtype"]) for x in shapes]
        return *arrays, random.normal(size=(self.batch, sq, heads)).astype(np.float32)

    def lengths(self):
        """The lengths of query and key; none where the problem has none."""
        random, static = self.random, self.static
        if not static["lengths"]:
            return {}
        of = dict(query_seq_lengths=static["seqlen_q"], key_value_seq_lengths=static["seqlen_k"])
        return {x: random.integers(0, n + 1, self.batch).astype(np.int32) for x, n in of.items()}

    def run(self, arrays, given):
        static = self.static

        def results(query, key, value, dout, dlse, given):
            def attend(query, key, value):
                return dot_product_attention(
                    query,
                    key,
                    value,
                    is_causal=static["is_causal"],
                    local_window_size=static["window"],
                    query_offset=static["offset"],
                    deterministic=static["deterministic"],
                    attention_chunk=chunk,
                    return_residual=True,
                    implementation="fa3",
                    **given,
                )

            (out, lse), vjp = jax.vjp(attend, query, key, value)
            return out, lse, *vjp((dout, dlse))

        given = dict(given)
        chunk = given.pop("attention_chunk", None)
        executable = jax.jit(results).lower(*arrays, given).compile()
        sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(executable.out_info)]
        spoil_free_memory([*sizes, executable.memory_analysis().temp_size_in_bytes])
        return Results(*map(np.asarray, executable(*arrays, given)))

    def check(self):
        static, lengths = self.static, self.lengths()
        given, begin, end = self.intervals()
        begin, end = (np.repeat(x, static["heads"][0] // x.shape[1], 1) for x in (begin, end))
        column = np.arange(static["seqlen_k"])
        in_window = oracle.visible(
            self.batch,
            static["seqlen_q"],
            static["seqlen_k"],
            is_causal=static["is_causal"],
            window=static["window"],
            offset=static["offset"],
            query_lengths=lengths.get("query_seq_lengths"),
            key_lengths=lengths.get("key_value_seq_lengths"),
        )
        arrays = [np.array(x) for x in self.arrays()]
        # Behind the last row that sees anything, and the last key that is seen, is padding.
        seen = (column >= begin[..., None]) & (column < end[..., None])
        rows_used, keys_used = (
            _up_to_last(seen.any(axes)) & oracle.used(n, lengths.get(name), self.batch)
            for axes, n, name in (
                ((1, 3), static["seqlen_q"], "query_seq_lengths"),
                ((1, 2), static["seqlen_k"], "key_value_seq_lengths"),
            )
        )
        sees = seen & in_window
        of_arrays = (rows_used, keys_used, keys_used, rows_used, rows_used)
        for x, used in zip(arrays, of_arrays, strict=True):
            x[~used] = np.nan
        got = self.run(arrays, given | lengths)
        exact, same = (
            oracle.attention(
                *arrays,
                sees=sees,
                query_used=rows_used,
                key_used=keys_used,
                scale=static["head_dims"][0] ** -0.5,
                precision=precision,
            )
            for precision in ("exact", static["dtype"])
        )
        for name, x in got.items():
            tolerance.check(name, x, getattr(exact, name), getattr(same, name))
        assert not np.any(got.out[~sees.any(3).swapaxes(1, 2)])
        unseen = ~sees.any((1, 2))
        assert not np.any(got.dkey[unseen]) and not np.any(got.dvalue[unseen])


class LongDocuments(Problem):
    """Of so many keys that the backward pass's work tiles begin where documents do
    (src/attention/key_tiles.h)."""

    batch = 1
    kinds = ("documents", "gaps", "chunks")
    seqlens = (1100, 2400)
    most_edges = 4


def _given(begin, end):
    return dict(kv_start=begin.astype(np.int32), kv_end=end.astype(np.int32))


def _up_to_last(x):
    """Whether there is a True at or behind each place of the last dimension."""
    return np.logical_or.accumulate(x[..., ::-1], -1)[..., ::-1]


@pytest.mark.parametrize("number", range(42))
def test_random_problems(number):
    Problem(number).check()


@pytest.mark.parametrize("number", range(42))
def test_long_documents(number):
    LongDocuments(number).check()
