"""One problem for attention, as data.

A Case holds shapes and options in the words of the public API and nothing else; `inputs` makes its
arrays, always the same ones for the same case, and `reference` has the oracle's answer for them.
"""

import dataclasses
import zlib

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

import oracle


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem.  Lengths, offsets and windows as in dot_product_attention."""

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
        ):
            value = getattr(self, field)
            if value is not None:
                values = value if isinstance(value, tuple) else (value,)
                words.append("_".join([field, *map(str, values)]))
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
        return options

    @property
    def index_arrays(self):
        """Array keyword arguments of dot_product_attention, int32 [batch]."""
        arrays = {
            "query_seq_lengths": self.query_lengths,
            "key_value_seq_lengths": self.key_lengths,
            "query_offset": self.offset if isinstance(self.offset, tuple) else None,
        }
        return {k: np.asarray(v, np.int32) for k, v in arrays.items() if v is not None}

    @property
    def sees(self):
        return oracle.visible(
            self.batch,
            self.seqlen_q,
            self.seqlen_k,
            is_causal=self.causal,
            window=self.window,
            offset=self.offset,
            query_lengths=self.query_lengths,
            key_lengths=self.key_lengths,
        )

    @property
    def query_used(self):
        return oracle.used(self.seqlen_q, self.query_lengths, self.batch)

    @property
    def key_used(self):
        return oracle.used(self.seqlen_k, self.key_lengths, self.batch)

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
        return oracle.attention(
            query,
            key,
            value,
            dout,
            dlse,
            sees=self.sees,
            query_used=self.query_used,
            key_used=self.key_used,
            scale=self.softmax_scale,
            precision=precision,
            xp=xp,
        )
