"""One problem for attention, as data.

A Case holds shapes and options in the words of the public API and nothing else; `inputs` makes its
arrays, always the same ones for the same case, and `reference` has the oracle's answer for them.
"""

import dataclasses
import functools
import itertools
import zlib

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

import oracle


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem.  Lengths, offsets and windows as in dot_product_attention.

    Documents are the lengths of each sequence's documents; rows behind the last are padding.
    Intervals are random: "row", for each row, which do not fall; "any", which may; "head" and
    "kv head", for each head; "prefix", an end alone.

    Slopes of alibi: "powers" of two, one for each head; "any", negative ones and zero too.
    Sinks are normal: "small"; "large", five times that.
    """

    batch: int = 2
    seqlen_q: int = 65
    seqlen_k: int = 65
    heads_q: int = 2
    heads_kv: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None  # of value and output; default head_dim
    dtype: str = "bfloat16"
    causal: bool = False
    window: int | tuple[int, int] | None = None
    offset: int | tuple[int, ...] | None = None
    query_lengths: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    scale: float | None = None
    deterministic: bool | None = None
    documents: tuple[tuple[int, ...], ...] | None = None
    key_documents: tuple[tuple[int, ...], ...] | None = None  # default: documents
    intervals: str | None = None
    chunk: int | None = None
    softcap: float | None = None
    alibi: str | None = None
    sinks: str | None = None
    max_logits: bool = False
    own_heads: int = 1  # sets of slopes and sinks; each serves as many sequences in a row
    seed: int = 0  # other values of all arrays

    bias_array = None  # of a subclass

    @property
    def name(self):
        """Readable and unique: the shape, then every option that is not the default."""
        words = [
            f"b{self.batch}",
            f"s{self.seqlen_q}x{self.seqlen_k}",
            f"h{self.heads_q}x{self.heads_kv}",
            f"d{self.head_dim}",
            self.dtype,
        ]
        if self.causal:
            words.append("causal")
        for field in (
            "head_dim_v",
            "window",
            "offset",
            "query_lengths",
            "key_lengths",
            "scale",
            "deterministic",
            "documents",
            "key_documents",
            "intervals",
            "chunk",
            "softcap",
            "alibi",
            "sinks",
        ):
            value = getattr(self, field)
            if value is not None and field.endswith("documents"):
                words.append("_".join([field, *map(_in_short, value)]))
            elif value is not None:
                values = value if isinstance(value, tuple) else (value,)
                words.append("_".join([field, *map(str, values)]))
        words += ["max_logits"] * self.max_logits
        words += [f"own_heads_{self.own_heads}"] * (self.own_heads > 1)
        words += [f"seed_{self.seed}"] * (self.seed != 0)
        return "-".join(words)

    @property
    def softmax_scale(self):
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def options(self):
        """Static keyword arguments of dot_product_attention."""
        options = {
            "scale": self.scale,
            "is_causal": self.causal,
            "local_window_size": self.window,
            "deterministic": self.deterministic,
        }
        if isinstance(self.offset, int):
            options["query_offset"] = self.offset
        if self.chunk is not None:
            options["attention_chunk"] = self.chunk
        if self.softcap is not None:
            options["logits_soft_cap"] = self.softcap
        if self.max_logits:
            options["return_max_logits"] = True
        return options

    @property
    def index_arrays(self):
        """Array keyword arguments of dot_product_attention, int32 with the batch first."""
        start, end = self._intervals
        arrays = {
            "query_seq_lengths": self.query_lengths,
            "key_value_seq_lengths": self.key_lengths,
            "query_offset": self.offset if isinstance(self.offset, tuple) else None,
            "query_segment_ids": self.query_ids,
            "key_value_segment_ids": self.key_ids,
            "kv_start": start,
            "kv_end": end,
        }
        return {k: np.asarray(v, np.int32) for k, v in arrays.items() if v is not None}

    @functools.cached_property
    def slopes_array(self):
        """float32 [own_heads, Hq], or None."""
        shape = (self.own_heads, self.heads_q)
        if self.alibi == "any":
            slopes = np.float32([-0.25, 0, 0.01, 0.3, 1, 1.5])
            return self._random("slopes").choice(slopes, shape)
        powers = 2.0 ** -(1 + np.arange(shape[0] * shape[1]).reshape(shape) % 8)
        return None if self.alibi is None else powers.astype("float32")

    @functools.cached_property
    def sinks_array(self):
        """float32 [own_heads, Hq], or None."""
        if self.sinks is None:
            return None
        sinks = self._random("sinks").standard_normal((self.own_heads, self.heads_q), np.float32)
        return sinks * {"small": 1, "large": 5}[self.sinks]

    @property
    def head_arrays(self):
        """Arguments of dot_product_attention that are the same for all sequences, float32 [Hq]."""
        arrays = {"alibi_slopes": self.slopes_array, "sinks": self.sinks_array}
        return {name: x[0] for name, x in arrays.items() if x is not None}

    def _random(self, what):
        return np.random.default_rng(zlib.crc32(f"{what} of {self.name}".encode()))

    @property
    def query_ids(self):
        """Numbers that do not fall where keys have theirs, and any others where not."""
        in_order = self.key_documents is not None
        return _ids(self.documents, self.seqlen_q, (lambda i: i + 1) if in_order else _scrambled)

    @property
    def key_ids(self):
        return _ids(self.key_documents, self.seqlen_k, lambda i: i + 1)

    @functools.cached_property
    def _intervals(self):
        """kv_start and kv_end as they are passed."""
        if self.intervals is None:
            return None, None
        rng = self._random("intervals")
        heads = {"head": (self.heads_q,), "kv head": (self.heads_kv,)}.get(self.intervals, ())
        shape = (self.batch, *heads, self.seqlen_q)
        if self.intervals == "prefix":
            prefix = rng.integers(0, self.seqlen_k + 1, (self.batch, 1))
            return None, np.maximum(np.arange(self.seqlen_q) + 1, prefix)
        if self.intervals == "any":
            start = rng.integers(-5, self.seqlen_k + 5, shape)
            return start, start + rng.integers(-9, 70, shape)
        start, end = np.sort(rng.integers(-5, self.seqlen_k - 20, (2, *shape)), -1)
        return np.minimum(start, end), np.maximum(start, end) + 9

    @property
    def _told(self):
        """What arrays say of who sees whom, for the oracle; intervals of all heads or one."""

        def by_head(x):
            if x is None or x.ndim == 2:
                return None if x is None else x[:, None]
            return np.repeat(x, self.heads_q // x.shape[1], 1)

        start, end = self._intervals
        return dict(
            query_ids=self.query_ids,
            key_ids=self.key_ids,
            start=by_head(start),
            end=by_head(end),
            chunk=self.chunk,
            offset=self.offset,
        )

    @property
    def has_visibility(self):
        return any(x is not None for x in (self.documents, self.intervals, self.chunk))

    @property
    def sees(self):
        """[B, Hq or 1, Sq, Sk]"""
        return oracle.visible(
            self.batch,
            self.seqlen_q,
            self.seqlen_k,
            is_causal=self.causal,
            window=self.window,
            query_lengths=self.query_lengths,
            key_lengths=self.key_lengths,
            **self._told,
        )

    @property
    def blind(self):
        """Query rows that see no key, [B, Sq, Hq]."""
        blind = ~self.sees.any(axis=3)
        shape = (self.batch, self.heads_q, self.seqlen_q)
        return np.swapaxes(np.broadcast_to(blind, shape), 1, 2)

    @property
    def unseen(self):
        """Keys that no row sees, [B, Sk, Hkv]."""
        seen = self.sees.any(axis=2)
        group = self.heads_q // self.heads_kv
        seen = np.broadcast_to(seen, (self.batch, self.heads_q, self.seqlen_k))
        seen = seen.reshape(self.batch, self.heads_kv, group, self.seqlen_k)
        return ~np.swapaxes(seen.any(axis=2), 1, 2)

    @property
    def row_exists(self):
        """Rows that have a sink, [B, Hq or 1, Sq]: before their sequence's length, and up to the
        last of their head that arrays let see a key."""
        used = oracle.used(self.seqlen_q, self.query_lengths, self.batch)[:, None]
        if not self.has_visibility:
            return used
        told = oracle.visible_by_arrays(self.batch, self.seqlen_q, self.seqlen_k, **self._told)
        met = told.any(axis=3)[..., ::-1]
        return used & np.logical_or.accumulate(met, axis=2)[..., ::-1]

    @property
    def distance(self):
        """How far rows are from keys, [B, Sq, Sk]."""
        offset = np.broadcast_to(np.int64(0 if self.offset is None else self.offset), (self.batch,))
        position = np.arange(self.seqlen_q)[:, None] + offset[:, None, None]
        return np.abs(position - np.arange(self.seqlen_k))

    @property
    def query_used(self):
        """Rows that are no padding: before their sequence's length, and up to the last one that
        arrays let see a key."""
        used = oracle.used(self.seqlen_q, self.query_lengths, self.batch)
        return used & self._up_to_last(2) if self.has_visibility else used

    @property
    def key_used(self):
        used = oracle.used(self.seqlen_k, self.key_lengths, self.batch)
        return used & self._up_to_last(3) if self.has_visibility else used

    def _up_to_last(self, axis):
        """[B, Sq] or [B, Sk]"""
        sees = oracle.visible_by_arrays(self.batch, self.seqlen_q, self.seqlen_k, **self._told)
        met = sees.any(axis=(1, 5 - axis))
        return np.logical_or.accumulate(met[:, ::-1], axis=1)[:, ::-1]

    def inputs(self):
        """query, key, value, dout, dlse: standard normal; the cotangents are random, never ones."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))

        def normal(seqlen, heads, *dim, dtype=self.dtype):
            return rng.standard_normal((self.batch, seqlen, heads, *dim), np.float32).astype(dtype)

        query = normal(self.seqlen_q, self.heads_q, self.head_dim)
        key = normal(self.seqlen_k, self.heads_kv, self.head_dim)
        head_dim_v = self.head_dim_v or self.head_dim
        value = normal(self.seqlen_k, self.heads_kv, head_dim_v)
        dout = normal(self.seqlen_q, self.heads_q, head_dim_v)
        dlse = normal(self.seqlen_q, self.heads_q, dtype=np.float32)
        return query, key, value, dout, dlse

    def reference(self, inputs, precision="exact", xp=np):
        """The oracle's answer for these inputs."""
        query, key, value, dout, dlse = inputs
        results = oracle.attention(
            query,
            key,
            value,
            dout,
            dlse,
            sees=self.sees,
            query_used=self.query_used,
            key_used=self.key_used,
            scale=self.softmax_scale,
            bias=self.bias_array,
            distance=self.distance,
            slopes=self.slopes_array,
            softcap=self.softcap,
            sinks=self.sinks_array,
            row_exists=self.row_exists,
            precision=precision,
            xp=xp,
        )
        return results if self.max_logits else dataclasses.replace(results, max_logits=None)


def _ids(documents, seqlen, number):
    """[B, seqlen]: the numbers of rows' documents, 0 behind the last."""
    if documents is None:
        return None
    ids = np.zeros((len(documents), seqlen), int)
    for row, lengths in zip(ids, documents, strict=True):
        ends = np.cumsum(lengths, dtype=int)
        for i, (length, end) in enumerate(zip(lengths, ends, strict=True)):
            row[end - length : end] = number(i)
    return ids


def _scrambled(i):
    """Each number once, in no order."""
    return 1 + 37 * (i + 1) % 1009


def _in_short(lengths):
    """Lengths of documents, equal neighbours together."""
    runs = ((length, len(list(same))) for length, same in itertools.groupby(lengths))
    return "+".join(f"{count}x{n}" if count > 1 else f"{n}" for n, count in runs) or "none"
