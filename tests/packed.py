"""The contract's part about packed documents: what every implementation must do beside the cases
that name documents, intervals and chunks."""

import dataclasses
import functools

import jax
import numpy as np

import contract
import tolerance
from case import Case
from cases import WIDE
from jax_fa3 import dot_product_attention, flash_attention_varlen, make_visibility
from oracle import Results
from transforms import assert_near

TOLD = {"query_segment_ids", "key_value_segment_ids", "kv_start", "kv_end"}


def results(attend, query, key, value, dout, dlse):
    (out, lse), vjp = jax.vjp(attend, query, key, value)
    return out, lse, *vjp((dout, dlse))


def run(implementation, function, *x):
    executable = jax.jit(function).lower(*x).compile()
    implementation.prepare(executable)
    return [np.asarray(y) for y in executable(*x)]


def check_made_once(implementation, case):
    """A table that is made before gives the bits of one that the call makes."""
    inputs, index = case.inputs(), case.index_arrays
    told = {name: x for name, x in index.items() if name in TOLD}
    others = {name: x for name, x in index.items() if name not in TOLD}
    options = case.options
    chunk = options.pop("attention_chunk", None)
    offset = index.get("query_offset", options.get("query_offset"))
    for_chunks = {} if chunk is None else dict(attention_chunk=chunk, query_offset=offset)
    visibility = jax.jit(
        functools.partial(
            make_visibility, **for_chunks, seqlen_q=case.seqlen_q, seqlen_k=case.seqlen_k
        )
    )(**told)

    def call(visibility, *x):
        attend = functools.partial(
            dot_product_attention,
            visibility=visibility,
            return_residual=True,
            implementation=implementation.name,
            **options,
            **others,
        )
        return results(attend, *x)

    want = implementation.run(case, inputs)
    got = Results(*run(implementation, call, visibility, *inputs))
    compared = ["out", "lse"] if implementation.name != "xla" else [n for n, _ in want.items()]
    for name in compared:
        assert getattr(got, name).tobytes() == getattr(want, name).tobytes(), name
    contract.compare(case, inputs, got)


def check_varlen(implementation, case, query_lengths, key_lengths=None):
    """flash_attention_varlen against one problem a document, whose causal mask and window end at
    the last row and key. `case` has the total rows, those behind the documents hold NaN."""
    is_self = key_lengths is None
    lengths = query_lengths, query_lengths if is_self else key_lengths
    cu_q, cu_k = (
        np.concatenate([[0], np.cumsum(x), [sum(x)] * 2]).astype(np.int32) for x in lengths
    )
    query, key, value, dout, dlse = (np.array(x) for x in case.inputs())
    spoiled = [np.array(x) for x in (query, key, value, dout, dlse)]
    for x, end in zip(spoiled, (cu_q, cu_k, cu_k, cu_q, cu_q), strict=True):
        x[:, end[-1] :] = np.nan

    def call(cu_q, cu_k, *x):
        attend = functools.partial(
            flash_attention_varlen,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=None if is_self else cu_k,
            softmax_scale=case.scale,
            causal=case.causal,
            window_size=case.window or (-1, -1),
            return_residual=True,
            implementation=implementation.name,
        )
        return results(attend, *x)

    got = Results(*run(implementation, call, cu_q, cu_k, *(x[0] for x in spoiled)))
    left, right = case.window or (-1, -1)
    window = tuple(WIDE if side < 0 else side for side in (left, right))
    exact, same = (Results(*(np.zeros(x.shape) for _, x in got.items())) for _ in ("exact", "same"))
    for expected, precision in ((exact, "exact"), (same, case.dtype)):
        expected.lse[:] = -np.inf
        for d in range(len(query_lengths)):
            q, k = slice(*cu_q[d : d + 2]), slice(*cu_k[d : d + 2])
            rows, keys = q.stop - q.start, k.stop - k.start
            document = dataclasses.replace(
                case, batch=1, seqlen_q=rows, seqlen_k=keys, offset=keys - rows, window=window
            )
            parts = (query[:, q], key[:, k], value[:, k], dout[:, q], dlse[:, q])
            answer = document.reference(parts, precision)
            for (name, x), place in zip(answer.items(), (q, q, q, k, k), strict=True):
                getattr(expected, name)[place] = x[0]
    for name, result in got.items():
        tolerance.check(name, result, getattr(exact, name), getattr(same, name))
    assert not np.any(got.out[cu_q[-1] :]) and not np.any(got.dquery[cu_q[-1] :])
    assert not np.any(got.dkey[cu_k[-1] :]) and not np.any(got.dvalue[cu_k[-1] :])


def check_illegal(implementation, case, illegal):
    """Ids that come back: NaN in that sequence's rows, in their LSE and in all gradients, and
    nowhere else; zeros past the length. `illegal` are ids that are wrong in the last sequence."""
    b = case.batch - 1
    got = implementation.run(case, case.inputs(), query_segment_ids=illegal)
    end = case.query_lengths[b]
    assert np.isnan(got.out[b, :end]).all() and np.isnan(got.lse[b, :end]).all()
    assert np.isnan(got.dquery[b, :end]).all()
    assert np.isnan(got.dkey[b]).any() and np.isnan(got.dvalue[b]).any()
    assert not np.any(got.out[b, end:]) and np.isneginf(got.lse[b, end:]).all()
    for _, x in got.items():
        assert not np.isnan(x[:b]).any()


def check_permutation(implementation, case, order):
    """Documents that change places take their results along."""
    lengths = np.asarray(case.documents[0])
    ends = np.cumsum(lengths)
    rows = np.concatenate([np.arange(ends[d] - lengths[d], ends[d]) for d in order])
    rows = np.concatenate([rows, np.arange(len(rows), case.seqlen_q)])
    moved = dataclasses.replace(case, documents=(tuple(lengths[list(order)].tolist()),))
    inputs = case.inputs()
    want = implementation.run(case, inputs)
    got = implementation.run(moved, [x[:, rows] for x in inputs])
    for (name, x), (_, y) in zip(got.items(), want.items(), strict=True):
        y = np.asarray(y)[:, rows]
        if name == "lse":
            np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y))
            x, y = (np.where(np.isneginf(z), 0, z) for z in (x, y))
        assert_near(x, y)


ILLEGAL_CASE = Case(
    batch=2,
    seqlen_q=140,
    seqlen_k=140,
    heads_q=4,
    heads_kv=2,
    head_dim=32,
    query_lengths=(140, 131),
    documents=((140,),) * 2,
)
PERMUTED_CASE = Case(
    batch=1,
    seqlen_q=300,
    seqlen_k=300,
    heads_q=4,
    heads_kv=2,
    causal=True,
    window=(60, 0),
    documents=((5, 64, 100, 1, 80),),
)


def illegal_ids():
    """The first sequence's are legal; the last's 7 comes back."""
    ids = np.full((ILLEGAL_CASE.batch, ILLEGAL_CASE.seqlen_q), 7, np.int32)
    ids[:, 30:70] = 3
    ids[0, 70:] = 9
    return ids


VARLEN = [  # (case, query lengths, key lengths or None)
    (Case(batch=1, seqlen_q=q, seqlen_k=k, head_dim=32, **options), lengths, of_keys)
    for q, k, lengths, of_keys in (
        (200, 200, (30, 64, 0, 70, 1), None),
        (130, 300, (30, 0, 50, 40), (80, 20, 50, 140)),
        (200, 90, (70, 60, 64), (40, 0, 45)),
    )
    for options in (
        dict(),
        dict(causal=True, heads_q=4),
        dict(causal=True, window=(20, -1)),
        dict(window=(16, 5), dtype="float16", scale=-0.3),
    )
]
