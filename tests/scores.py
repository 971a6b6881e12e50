"""Random problems with sinks, largest logits, a cap or slopes, for every implementation; the checks
are those of dense.py."""

import numpy as np

import dense
from dense import Dense

KINDS = ("plain", "softcap", "alibi")  # the kernels have one of the latter two at a time
UP_TO_128 = (  # head dims of query and key, and of value
    (8, 8), (16, 16), (32, 32), (40, 40), (64, 64), (72, 72), (96, 96), (128, 128), (32, 16),
    (24, 64), (40, 72), (64, 128), (128, 96),
)  # fmt: skip
HEAD_DIMS = {
    "plain": dense.HEAD_DIMS,
    "softcap": (*UP_TO_128, (200, 200), (256, 256), (248, 200)),
    "alibi": UP_TO_128,
}
CAPS = (0.7, 5.0, 20.0, 30.0, 50.0)
NUMBERS = 3 * 312  # of random problems


def random_case(number):
    """The same for the same number; neighbours are of different kinds. A plain one has both sinks
    and largest logits, and most of them a bias, a mask or both."""
    rng = np.random.default_rng([7, number])

    def pick(*choices):
        return choices[int(rng.integers(len(choices)))]

    def lengths(seqlen):
        return tuple(rng.integers(0, seqlen + 1, batch).tolist())

    def documents():
        """Of one sequence, some of them empty; what is behind the last is padding."""
        ends = np.sort(rng.integers(0, seqlen_q + 1, 6))
        return tuple(np.diff(ends, prepend=0).tolist())

    kind = KINDS[number % 3]
    fold = pick(None, None, 2)
    batch = (fold or 1) * pick(1, 2, 3)
    seqlen_q, seqlen_k = pick(*dense.SIZES)
    head_dim, head_dim_v = HEAD_DIMS[kind][number // 3 % len(HEAD_DIMS[kind])]
    heads_kv = pick(1, 2)
    seen_by = pick(None, None, "documents", "intervals", "chunk")
    if seen_by == "documents":
        seqlen_q = seqlen_k = min(max(seqlen_q, seqlen_k), 512)
        options = dict(documents=tuple(documents() for _ in range(batch)))
    elif seen_by == "intervals":
        forms = ("any", "row", "prefix", "head", "kv head") if seqlen_k > 40 else ("any",)
        options = dict(intervals=pick(*forms))
    elif seen_by == "chunk":
        options = dict(chunk=pick(1, 50, 64, 300))
    else:
        options = {}
    if kind == "plain":
        bias, mask = pick(*dense.BIAS_DIMS, None, None), pick(*dense.MASK_DIMS, None, None)
        if fold:
            bias, mask = (x and x.replace("b", pick("b", "g")) for x in (bias, mask))
        options |= dict(bias=bias, bias_values=pick(*dense.BIAS_VALUES))
        options |= dict(mask=mask, mask_values=pick(*dense.MASK_VALUES))
    elif kind == "softcap":
        options |= dict(softcap=pick(*CAPS))
    else:
        options |= dict(alibi=pick("powers", "any"))
    is_plain = kind == "plain"
    return Dense(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads_q=heads_kv * pick(1, 2, 3),
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=None if head_dim_v == head_dim else head_dim_v,
        dtype=pick("bfloat16", "float16"),
        causal=pick(False, True),
        window=pick(None, None, (int(rng.integers(300)), int(rng.integers(90)))),
        offset=pick(None, int(rng.integers(-99, 300)), lengths(150)),
        query_lengths=pick(None, None, None, lengths(seqlen_q)),
        key_lengths=pick(None, None, None, lengths(seqlen_k)),
        scale=pick(*[None] * 5, 0.05, -0.3, 1.0),
        deterministic=pick(None, None, False, True),
        sinks=pick("small", "large", *[None] * (0 if is_plain else 2)),
        max_logits=is_plain or pick(False, True),
        own_heads=fold if fold and pick(False, True) else 1,
        wants_dbias=pick(True, True, False),
        fold=fold,
        **options,
    )
