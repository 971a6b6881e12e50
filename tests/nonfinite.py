"""The contract's part about non-finite inputs: where one NaN or infinity shows in the results."""

import dataclasses

import numpy as np

import tolerance
from cases import Case


@dataclasses.dataclass(frozen=True)
class Reach:
    """Where one non-finite input element must show in a result, and where it may."""

    must: np.ndarray
    may: np.ndarray


def reach_of(case, operand, b, i, h):
    """Reach of element [b, i, h, 0] of an operand, by result name.

    A masked score is replaced, so it hides q and k; but a zero probability times a non-finite
    value or key is NaN, so such an element may show anywhere in its own heads' matrix products.
    """
    group = case.heads_q // case.heads_kv
    kv_head = h // group if operand == "query" else h
    heads = [h] if operand == "query" else list(range(h * group, (h + 1) * group))
    sees = case.sees[b, 0]
    rows = np.arange(case.seqlen_q) == i if operand == "query" else sees[:, i]
    keys = sees[rows].any(axis=0)

    def mark(seqlen, heads, where, dims=slice(None)):
        marked = np.zeros((case.batch, seqlen, case.heads_q, case.head_dim), bool)
        for head in heads:
            marked[b, where, head, dims] = True
        return marked

    def at_queries(where, dims=slice(None)):
        return mark(case.seqlen_q, heads, where, dims)

    def at_keys(where):
        return mark(case.seqlen_k, [kv_head], where)[:, :, : case.heads_kv]

    anywhere = slice(None)
    none = np.zeros_like(at_queries(rows))
    if operand == "value":
        return {
            "out": Reach(at_queries(rows, 0), at_queries(anywhere, 0)),
            "lse": Reach(none[..., 0], none[..., 0]),
            "dquery": Reach(at_queries(rows), at_queries(anywhere)),
            "dkey": Reach(at_keys(keys), at_keys(anywhere)),
            "dvalue": Reach(at_keys(keys) & False, at_keys(anywhere) & False),
        }
    rows_only = at_queries(rows)
    return {
        "out": Reach(rows_only, rows_only),
        "lse": Reach(rows_only[..., 0], rows_only[..., 0]),
        "dquery": Reach(rows_only, rows_only if operand == "query" else at_queries(anywhere)),
        "dkey": Reach(at_keys(keys), at_keys(anywhere)),
        "dvalue": Reach(at_keys(keys), at_keys(anywhere)),
    }


def check_nonfinite(implementation, case, operand, poison):
    """A non-finite element shows in the rows that use it and nowhere beyond its own heads."""
    clean = case.inputs()
    position = ["query", "key", "value"].index(operand)
    b, i, h = case.batch - 1, clean[position].shape[1] // 2, clean[position].shape[2] - 1
    inputs = [np.array(x) for x in clean]
    inputs[position][b, i, h, 0] = poison
    got = implementation.run(case, inputs)
    exact, same = case.reference(clean), case.reference(clean, case.dtype)
    for name, reach in reach_of(case, operand, b, i, h).items():
        result, x, s = (np.array(getattr(r, name)) for r in (got, exact, same))
        if np.isnan(poison):  # an infinite score of the right sign may simply win or lose
            missing = np.argwhere(reach.must & ~np.isnan(result))
            assert not len(missing), f"NaN in {operand} does not show in {name} at {missing[0]}"
        x[reach.may] = s[reach.may] = result[reach.may] = 0
        tolerance.check(f"{name}, {poison} in {operand}", result, x, s)


NONFINITE = [
    (operand, poison) for operand in ("query", "key", "value") for poison in (np.nan, np.inf)
]

NONFINITE_CASE = Case(
    batch=2,
    seqlen_q=70,
    seqlen_k=90,
    heads_q=4,
    heads_kv=2,
    head_dim=32,
    causal=True,
    window=(40, 0),
    offset=(10, 0),
)
