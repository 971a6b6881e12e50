"""Documents, intervals and chunks over a divided sequence, on CPU devices: against the oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import contract
import jax_fa3
from case import Case
from collectives import collectives
from jax_fa3 import dot_product_attention, make_visibility
from meshes import (
    KINDS,
    PART,
    STRATEGIES,
    check_strategy,
    compiled_for,
    in_layout,
    mesh_of,
    place,
    run,
)
from oracle import Results

BASE = Case(batch=2, seqlen_q=64, seqlen_k=64, heads_q=8, heads_kv=2, head_dim=16)
of = functools.partial(dataclasses.replace, BASE)
IDS = of(documents=((5, 30, 20), (16, 9, 39)))
KEY_IDS = of(seqlen_k=128, documents=((30, 30), (0, 64)), key_documents=((9, 80), (64, 60)))
CHUNK = of(chunk=24, offset=(0, 9))
CAUSAL = dataclasses.replace(IDS, causal=True)
LENGTHS = dataclasses.replace(CAUSAL, query_lengths=(64, 40), key_lengths=(50, 64))

MATRIX = [
    ("ring", "contiguous", 4, CAUSAL),
    ("ring", "zigzag", 2, LENGTHS),
    ("ring", "zigzag", 2, of(intervals="any")),
    ("ring", "contiguous", 2, of(intervals="kv head", causal=True)),
    ("ring", "contiguous", 2, dataclasses.replace(KEY_IDS, window=(40, 20), offset=30)),
    ("ring", "contiguous", 2, dataclasses.replace(CHUNK, causal=True)),
    ("allgather", "contiguous", 8, CAUSAL),
    ("allgather", "zigzag", 4, LENGTHS),
    ("allgather", "contiguous", 4, of(intervals="any", window=(30, 20))),
    ("allgather", "zigzag", 4, of(intervals="kv head", causal=True)),
    ("allgather", "contiguous", 4, KEY_IDS),
    ("allgather", "zigzag", 4, CHUNK),
    ("ulysses", "contiguous", 8, CAUSAL),
    ("ulysses", "zigzag", 4, LENGTHS),
    ("ulysses", "zigzag", 4, of(intervals="head")),
    ("ulysses", "contiguous", 4, dataclasses.replace(CHUNK, causal=True)),
]
WIDE = Case(batch=1, seqlen_q=1024, seqlen_k=1024, heads_q=2, heads_kv=1, head_dim=16)
wide = functools.partial(dataclasses.replace, WIDE)
STRIPED = [
    ("allgather", wide(documents=((300, 500, 150),), causal=True, query_lengths=(900,))),
    ("allgather", wide(intervals="any", window=(300, 100), offset=(40,))),
    ("allgather", wide(causal=True, key_lengths=(700,))),
    ("ulysses", wide(intervals="prefix")),
]


def name_of(x):
    return getattr(x, "name", x)


@pytest.mark.parametrize(("strategy", "layout", "size", "case"), MATRIX, ids=name_of)
def test_case(strategy, layout, size, case):
    check_strategy(case, strategy, layout, size)


@pytest.mark.parametrize(("strategy", "case"), STRIPED, ids=name_of)
def test_stripes(strategy, case):
    check_strategy(case, strategy, "striped", 2)


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("automatic", "auto"),
        ("automatic", "ring"),
        ("explicit", "allgather"),
        ("explicit", "ulysses"),
    ],
)
def test_a_sequence_that_arrives_split(kind, strategy):
    """Under jit and with explicit sharding, ids split as the rows are."""
    case = dataclasses.replace(CAUSAL, heads_q=4)
    mesh, split = mesh_of(KINDS[kind], data=2, seq=2), P("data", "seq")

    def results(query, key, value, dout, dlse, ids):
        attend = functools.partial(
            dot_product_attention,
            is_causal=True,
            return_residual=True,
            query_segment_ids=ids,
            sequence_parallel=strategy,
        )
        primals, vjp = jax.vjp(attend, query, key, value)
        return *primals, *vjp((dout, dlse))

    inputs = case.inputs()
    with jax.set_mesh(mesh):
        ids = np.asarray(case.query_ids, np.int32)
        compiled = compiled_for(results, *place(mesh, (*inputs, ids), (split,) * 6))
        got = compiled(*place(mesh, (*inputs, ids), (split,) * 6))
    contract.compare(case, inputs, Results(*map(np.asarray, got)))
    assert got[0].sharding.spec[1] == "seq"
    moves = {name for name, _ in collectives(compiled)}
    expected = {"ring": "collective-permute", "ulysses": "all-to-all"}
    assert expected.get(strategy, "reduce-scatter") in moves


def test_a_table_of_the_whole_sequence():
    """Made outside of shard_map from cu_seqlens, with a batch of one for all sequences. A row that
    sees nothing of its own device's keys has a sink all the same."""
    ends = np.array([0, 5, 35, 60, 60], np.int32)
    case = of(documents=((5, 30, 25),) * 2, causal=True, heads_q=4, sinks="small", max_logits=True)

    def attend(table, sinks, *x):
        call = functools.partial(jax_fa3.ring_attention, axis_name="seq", **case.options)
        return call(*x, visibility=table, sinks=sinks, return_residual=True)

    def results(ends, sinks, query, key, value, dout, dlse):
        table = make_visibility(cu_seqlens_q=ends, seqlen_q=64)
        mapped = jax.shard_map(
            attend,
            mesh=mesh_of(seq=2),
            in_specs=(P(), P(), *(PART,) * 3),
            out_specs=(PART, PART, P()),
        )
        (out, lse, largest), vjp = jax.vjp(
            functools.partial(mapped, table), sinks, query, key, value
        )
        dsinks, *gradients = vjp((dout, dlse, jnp.zeros_like(largest)))
        return out, lse, *gradients, None, dsinks[None], largest

    got = run(results, ends, case.sinks_array[0], *case.inputs())
    got = Results(*(None if x is None else np.asarray(x) for x in got))
    contract.compare(case, case.inputs(), got)


@pytest.mark.parametrize(
    ("strategy", "layout", "size"),
    [("ring", "contiguous", 2), ("allgather", "striped", 2)],
)
def test_ids_that_come_back_give_nan(strategy, layout, size):
    """In their sequence alone."""
    seqlen = 512 if layout == "striped" else 32
    case = Case(batch=2, seqlen_q=seqlen, seqlen_k=seqlen, heads_q=2, head_dim=16, causal=True)
    ids = np.ones((2, seqlen), np.int32)
    ids[1, 8:12] = 2

    def attend(ids, *x):
        call = functools.partial(STRATEGIES[strategy], axis_name="seq", layout=layout)
        out, vjp = jax.vjp(functools.partial(call, is_causal=True, query_segment_ids=ids), *x)
        return out, *vjp(jnp.ones_like(out))

    mapped = jax.shard_map(attend, mesh=mesh_of(seq=size), in_specs=(PART,) * 4, out_specs=PART)
    inputs = (in_layout(layout, size, x) for x in (ids, *case.inputs()[:3]))
    for x in map(np.asarray, run(mapped, *inputs)):
        assert np.isnan(x[1]).all() and not np.isnan(x[0]).any()


def test_arguments_that_do_not_fit_raise():
    x, ids = jnp.zeros((1, 1024, 2, 16), "bfloat16"), jnp.ones((1, 1024), jnp.int32)
    wrong = {
        "1024 query rows and 1024 keys; expected 2048 and 2048 .* on all devices": dict(
            visibility=make_visibility(ids)
        ),
        "visibility and kv_end are given": dict(
            visibility=make_visibility(seqlen_q=2048, seqlen_k=2048, attention_chunk=3), kv_end=ids
        ),
        r"kv_start has shape \(1, 3\)": dict(kv_start=ids[:, :3]),
        "'striped'; expected 'contiguous' or 'zigzag' for a ring": dict(layout="striped"),
        "'striped' and alibi_slopes": dict(layout="striped", alibi_slopes=jnp.ones(2)),
    }
    for words, options in wrong.items():
        strategy = "allgather" if "alibi_slopes" in options else "ring"
        call = functools.partial(STRATEGIES[strategy], axis_name="seq", **options)
        mapped = jax.shard_map(call, mesh=mesh_of(seq=2), in_specs=P(), out_specs=P())
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(mapped, x, x, x)
    call = functools.partial(STRATEGIES["allgather"], axis_name="seq", layout="striped")
    mapped = jax.shard_map(call, mesh=mesh_of(seq=2), in_specs=PART, out_specs=PART)
    with pytest.raises(ValueError, match="query has seq = 300 .* multiple of 256 .*'striped'"):
        jax.eval_shape(mapped, *(x[:, :600],) * 3)
