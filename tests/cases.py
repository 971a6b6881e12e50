"""Named problems: CASES is the list that every implementation must pass."""

from case import Case

WIDE = 10_000  # a window side wider than any sequence here


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

VALUE_DIMS = vary(
    dict(head_dim=24, head_dim_v=40),
    dict(head_dim=48, head_dim_v=8, causal=True, heads_kv=1),
    dict(head_dim=192, head_dim_v=128, causal=True),
    dict(head_dim=128, head_dim_v=192, window=(30, 5)),
    dict(head_dim=192, head_dim_v=64, key_lengths=(65, 17), offset=7, causal=True),
)

DOCUMENTS = ((30, 100, 70, 33), (*[1] * 20, 200, 0, 37))

PACKED = (
    vary(
        dict(),
        dict(causal=True),
        dict(causal=True, window=(20, 0), dtype="float32"),
        dict(window=(70, 5), dtype="float16"),
        dict(causal=True, query_lengths=(257, 100), key_lengths=(190, 257)),
        dict(causal=True, offset=-5, dtype="float32"),
        dict(causal=True, offset=(3, -40), window=(64, 0)),
        dict(causal=True, heads_q=4, heads_kv=1),
        dict(heads_q=4, scale=-0.2, dtype="float32"),
        dict(chunk=50, causal=True),
        dict(chunk=64, intervals="any"),
        documents=DOCUMENTS,
        seqlen_q=257,
        seqlen_k=257,
        head_dim=32,
    )
    + vary(
        dict(documents=((257,), ())),
        dict(documents=((), ()), causal=True),
        dict(documents=((128, 129), (64, 64, 64, 65)), causal=True),
        dict(intervals="row"),
        dict(intervals="row", causal=True, query_lengths=(200, 256)),
        dict(intervals="any", window=(90, 40)),
        dict(intervals="prefix"),
        dict(intervals="prefix", key_lengths=(257, 130), dtype="float32"),
        dict(intervals="head", heads_q=4),
        dict(intervals="kv head", heads_q=4, causal=True),
        dict(intervals="head", heads_q=3, heads_kv=1, dtype="float32"),
        dict(chunk=64),
        dict(chunk=100, causal=True, offset=(7, -130)),
        dict(chunk=1, offset=40, dtype="float32"),
        dict(chunk=1 << 30, causal=True),
        seqlen_q=257,
        seqlen_k=257,
        head_dim=32,
    )
    + vary(
        dict(documents=((64, 1, 60), (0, 100, 30)), key_documents=((100, 0, 200), (30, 270))),
        dict(
            documents=((64, 1, 60), (0, 100, 30)),
            key_documents=((100, 2, 80), (30, 190)),
            causal=True,
            offset=(36, 60),
            heads_q=4,
        ),
        dict(intervals="row", heads_q=4, dtype="float32"),
        dict(intervals="any", causal=True, offset=150),
        dict(chunk=70, offset=90),
        seqlen_q=130,
        seqlen_k=300,
        head_dim=32,
    )
    + vary(
        *[dict(head_dim=d) for d in HEAD_DIMS],
        dict(head_dim=128, heads_q=4, dtype="float16"),
        dict(head_dim=192, head_dim_v=128),
        dict(head_dim=64, head_dim_v=96, heads_q=4),
        batch=1,
        documents=((40, 61, 9),),
        seqlen_q=130,
        seqlen_k=130,
        causal=True,
    )
    + vary(
        dict(batch=0, documents=()),
        dict(seqlen_q=0, seqlen_k=0, documents=((), ())),
        dict(seqlen_k=0, intervals="prefix", seqlen_q=9),
        dict(batch=1, seqlen_q=1100, seqlen_k=1100, documents=((300, 5, 700),), causal=True),
        head_dim=16,
    )
)

SCORES = (  # no two of a cap and slopes: the kernels have none for them
    vary(
        dict(sinks="small"),
        dict(sinks="large", causal=True, query_lengths=(65, 17), key_lengths=(0, 40)),
        dict(max_logits=True, causal=True, key_lengths=(0, 65), dtype="float32"),
        dict(max_logits=True, window=(9, 3), offset=(-90, 7), heads_q=4, heads_kv=1),
        dict(softcap=0.5, scale=-1.0),
        dict(softcap=5.0, causal=True, key_lengths=(65, 3), dtype="float16"),
        dict(softcap=30.0, sinks="small", max_logits=True, heads_q=4, dtype="float32"),
        dict(alibi="powers", causal=True),
        dict(alibi="any", offset=(5, -30), window=(20, 9), heads_q=4, dtype="float32"),
        dict(alibi="powers", sinks="small", max_logits=True, query_lengths=(20, 65), heads_q=6),
        head_dim=32,
    )
    + vary(
        dict(sinks="small", documents=((30, 0, 70), (*[1] * 9, 100))),
        dict(sinks="large", max_logits=True, intervals="head", heads_q=4, dtype="float32"),
        dict(softcap=2.0, sinks="small", chunk=50, offset=7),
        dict(alibi="powers", max_logits=True, documents=((30, 70), (130,)), causal=True),
        seqlen_q=130,
        seqlen_k=130,
        head_dim=40,
    )
    + vary(
        dict(head_dim=128, sinks="small", max_logits=True, dtype="float16"),
        dict(head_dim=192, head_dim_v=128, sinks="small", max_logits=True),
        dict(head_dim=128, softcap=20.0, max_logits=True),
        dict(head_dim=256, softcap=20.0, sinks="small"),
        dict(head_dim=64, seqlen_q=1, offset=199, alibi="any", sinks="large", max_logits=True),
        dict(head_dim=64, seqlen_q=300, seqlen_k=900, offset=600, sinks="small", max_logits=True),
        batch=1,
        seqlen_k=200,
        heads_q=4,
        causal=True,
    )
    + vary(
        dict(batch=0, sinks="small"),
        dict(seqlen_q=0),
        dict(seqlen_k=0, query_lengths=(9, 2), seqlen_q=9),
        sinks="large",
        max_logits=True,
        head_dim=16,
    )
)

CASES = (
    HEADS
    + DIMS
    + VALUE_DIMS
    + SEQLENS
    + EMPTY
    + WINDOWS
    + OFFSETS
    + LENGTHS
    + SCALES
    + DEEP
    + PACKED
    + SCORES
)

ODD_DIMS = vary(dict(head_dim=16, head_dim_v=17, key_lengths=(7, 60), dtype="float32"))  # XLA's

assert len({case.name for case in CASES}) == len(CASES), "two cases share a name"
