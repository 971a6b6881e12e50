"""Named problems: what an attention call is given, as data.

A Case holds shapes and options in the words of the public API and nothing else; `inputs` makes its
arrays, always the same ones for the same case.  CASES is the list every implementation must pass.
"""

import dataclasses
import zlib

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

import oracle

WIDE = 10_000  # a window side wider than any sequence here


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


def vary(*variants, **common):
    """Cases that share `common` and differ in `variants`."""
    return [Case(**(common | variant)) for variant in variants]


HEAD_DIMS = (8, 40, 64, 80, 96, 112, 128, 160, 192, 256)

HEADS = vary(
    *[dict(heads_q=q, heads_kv=kv) for q, kv in ((1, 1), (3, 3), (6, 2), (4, 1), (8, 4))],
    seqlen_q=33,
    seqlen_k=40,
    causal=True,
    dtype="float32",
)

DIMS = (
    vary(*[dict(head_dim=d) for d in HEAD_DIMS], batch=1, seqlen_q=70, seqlen_k=63)
    + vary(
        *[dict(head_dim=d) for d in (24, 72, 200, 248)],
        batch=1,
        causal=True,
        heads_q=4,
        dtype="float16",
    )
    + vary(*[dict(head_dim=d) for d in (64, 128, 256)], batch=1, causal=True, dtype="float16")
)

SEQLENS = vary(
    *[
        dict(seqlen_q=sq, seqlen_k=sk)
        for sq, sk in (
            (1, 1),
            (1, 200),
            (200, 1),
            (7, 63),
            (63, 7),
            (64, 64),
            (65, 129),
            (113, 257),
            (257, 113),
            (128, 128),
            (3, 640),
            (640, 3),
        )
    ],
    batch=1,
    head_dim=64,
) + vary(
    *[
        dict(seqlen_q=sq, seqlen_k=sk)
        for sq, sk in ((1, 1), (1, 77), (77, 1), (63, 63), (65, 200), (200, 65), (257, 257))
    ],
    batch=1,
    head_dim=32,
    causal=True,
)

EMPTY = vary(
    dict(batch=0),
    dict(seqlen_q=0),
    dict(seqlen_k=0),
    dict(seqlen_q=0, seqlen_k=0),
    dict(batch=0, query_lengths=(), key_lengths=(), causal=True, offset=()),
    dict(seqlen_k=0, causal=True, query_lengths=(3, 65)),
    head_dim=16,
)

WINDOWS = vary(
    *[
        dict(window=w)
        for w in (
            (3, 2),
            (0, 0),
            (16, 0),
            (0, 16),
            (64, 64),
            5,
            0,
            (WIDE, 3),
            (3, WIDE),
            (WIDE, WIDE),
        )
    ],
    batch=1,
    seqlen_q=80,
    seqlen_k=80,
    head_dim=32,
) + vary(
    dict(window=(7, 9)),
    dict(window=(0, 9)),
    dict(window=(WIDE, 0)),
    dict(window=0),
    dict(window=(2, 1), seqlen_q=130),
    dict(window=(70, 0), seqlen_q=20, seqlen_k=200),
    batch=1,
    seqlen_q=70,
    seqlen_k=90,
    head_dim=32,
    causal=True,
    dtype="float32",
)

OFFSETS = vary(
    dict(offset=5),
    dict(offset=-5),
    dict(offset=60),
    dict(offset=-200),
    dict(offset=200),
    dict(offset=(0, 31)),
    dict(offset=(-20, 45)),
    dict(offset=(-100, 100)),
    dict(offset=24, seqlen_q=41),
    dict(offset=64, seqlen_q=1),
    dict(offset=(64, 12), seqlen_q=1),
    dict(offset=(-3, 7), window=(10, 4)),
    dict(offset=30, window=(10, 10), causal=False),
    dict(offset=(-80, 80), window=(3, 0), causal=False),
    dict(offset=(7, -7), causal=False),
    head_dim=32,
    causal=True,
)

LENGTHS = vary(
    dict(query_lengths=(65, 17)),
    dict(key_lengths=(65, 17)),
    dict(key_lengths=(0, 1)),
    dict(query_lengths=(0, 65), key_lengths=(65, 0)),
    dict(query_lengths=(64, 1), key_lengths=(2, 63)),
    dict(query_lengths=(0, 0), key_lengths=(0, 0)),
    dict(query_lengths=(65, 65), key_lengths=(65, 65)),
    head_dim=32,
) + vary(
    dict(query_lengths=(40, 13)),
    dict(key_lengths=(40, 13)),
    dict(query_lengths=(30, 65), key_lengths=(65, 30)),
    dict(key_lengths=(10, 50), window=(4, 0)),
    dict(key_lengths=(20, 64), offset=(-4, 40)),
    dict(query_lengths=(33, 1), key_lengths=(64, 0), offset=(31, -2), window=(9, 3)),
    dict(query_lengths=(1, 1), key_lengths=(64, 33), offset=(63, 32), seqlen_q=1),
    head_dim=32,
    causal=True,
    heads_q=4,
    dtype="float32",
)

SCALES = vary(
    dict(scale=1.0),
    dict(scale=0.01),
    dict(scale=0.0),
    dict(scale=-0.3),
    batch=1,
    head_dim=32,
    causal=True,
    dtype="float32",
) + vary(dict(scale=0.5), dict(scale=-0.2), batch=1, head_dim=64)

DEEP = vary(  # several blocks of keys, and rows that start in a masked one
    dict(seqlen_q=300, seqlen_k=1100, offset=800, causal=True),
    dict(seqlen_q=40, seqlen_k=1101),
    dict(seqlen_q=600, seqlen_k=600, causal=True, window=(200, 0)),
    dict(
        seqlen_q=300,
        seqlen_k=900,
        key_lengths=(850,),
        query_lengths=(299,),
        window=(40, 30),
        offset=(500,),
    ),
    dict(seqlen_q=1030, seqlen_k=520, offset=-400, causal=True, heads_kv=1),
    batch=1,
    head_dim=16,
)

CASES = HEADS + DIMS + SEQLENS + EMPTY + WINDOWS + OFFSETS + LENGTHS + SCALES + DEEP

VALUE_DIMS = vary(  # without kernels
    dict(head_dim=24, head_dim_v=40),
    dict(head_dim=48, head_dim_v=8, causal=True, heads_kv=1),
    dict(head_dim=16, head_dim_v=17, key_lengths=(7, 60), dtype="float32"),
)

assert len({case.name for case in CASES}) == len(CASES), "two cases share a name"
