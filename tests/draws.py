"""What random problems have in common, drawn from one generator."""

import numpy as np

SIZES = (  # query rows and keys
    (64, 128), (129, 129), (200, 333), (333, 200), (1, 250), (250, 1), (7, 500), (385, 130),
    (191, 257), (512, 512), (40, 900), (900, 70), (256, 640),
)  # fmt: skip
INTERVALS = ("any", "row", "prefix", "head", "kv head")


class Draws:
    """The same draws for the same seed. `fold` is as in dense.Dense."""

    def __init__(self, seed, sizes=SIZES):
        self.rng = np.random.default_rng(seed)
        self.fold = self.pick(None, None, 2)
        self.batch = (self.fold or 1) * self.pick(1, 2, 3)
        self.seqlen_q, self.seqlen_k = self.pick(*sizes)

    def pick(self, *choices):
        return choices[int(self.rng.integers(len(choices)))]

    def lengths(self, seqlen):
        return tuple(self.rng.integers(0, seqlen + 1, self.batch).tolist())

    def documents(self):
        """Of one sequence, some of them empty; what is behind the last is padding."""
        ends = np.sort(self.rng.integers(0, self.seqlen_q + 1, 6))
        return tuple(np.diff(ends, prepend=0).tolist())

    def visibility(self):
        """Documents, intervals, chunks or none of them. Documents make both lengths equal."""
        kind = self.pick(None, None, "documents", "intervals", "chunk")
        if kind == "documents":
            self.seqlen_q = self.seqlen_k = min(max(self.seqlen_q, self.seqlen_k), 512)
            return dict(documents=tuple(self.documents() for _ in range(self.batch)))
        if kind == "intervals":
            return dict(intervals=self.pick(*INTERVALS) if self.seqlen_k > 40 else "any")
        if kind == "chunk":
            return dict(chunk=self.pick(1, 50, 64, 300))
        return {}

    def fields(self, heads_kv, head_dims, scales):
        """Fields of a Case that every problem has; `head_dims` are key's and value's."""
        pick, integers = self.pick, self.rng.integers
        head_dim, head_dim_v = head_dims
        return dict(
            batch=self.batch,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            heads_q=heads_kv * pick(1, 2, 3),
            heads_kv=heads_kv,
            head_dim=head_dim,
            head_dim_v=None if head_dim_v == head_dim else head_dim_v,
            dtype=pick("bfloat16", "float16"),
            causal=pick(False, True),
            window=pick(None, None, (int(integers(300)), int(integers(90)))),
            offset=pick(None, int(integers(-99, 300)), self.lengths(150)),
            query_lengths=pick(None, None, None, self.lengths(self.seqlen_q)),
            key_lengths=pick(None, None, None, self.lengths(self.seqlen_k)),
            scale=pick(*scales),
            deterministic=pick(None, None, False, True),
        )
