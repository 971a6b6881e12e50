"""benchmarks.balance on any machine: what it counts, and its records of small problems."""

import argparse
import json

import jax
import numpy as np
import pytest

from benchmarks import balance
from jax_fa3.context_parallel import layout as layouts


@pytest.mark.parametrize("layout", balance.ORDERS)
def test_rows_are_those_that_the_layout_deals(layout):
    rows = balance.rows_of(layout, 2048, 4)
    table = {
        "contiguous": layouts.chunk_table("contiguous", 4),
        "zigzag": layouts.chunk_table("zigzag", 4),
        "striped": layouts.stripe_table(512, 4),
    }[layout]
    chunk = 512 // len(table)
    starts = table.T[..., None] * chunk
    np.testing.assert_array_equal(rows, (starts + np.arange(chunk)).reshape(4, -1))


def test_documents_over_stripes_are_balanced_and_over_parts_are_not():
    """What the design rests on: eight devices, 256k tokens, causal."""
    for documents in ("lognormal-2048", "lognormal-32768"):
        args = argparse.Namespace(devices=8, tokens=1 << 18, documents=[documents])
        found = {x["layout"]: x["imbalance"]["scores"] for x in balance.run(args, None)}
        assert found["striped"] < 1.1
        assert min(found["contiguous"], found["zigzag"]) > 1.2


def test_records_of_a_small_problem(monkeypatch):
    for name, x in dict(HEADS=2, KV_HEADS=1, HEAD_DIM=8).items():
        monkeypatch.setattr(balance, name, x)
    times = iter(range(1, 100))

    def clock(run, *inputs):
        for x in jax.tree.leaves(run(*inputs)):
            assert np.isfinite(np.asarray(x, np.float32)).all()
        return float(next(times))

    args = argparse.Namespace(devices=2, tokens=512, documents=["equal-128"])
    records = balance.run(args, clock)
    assert [x["layout"] for x in records] == list(balance.ORDERS)
    assert records[0]["kernel_ms"] == dict(forward=[1, 3], backward=[2, 4])
    assert records[0]["imbalance"]["forward"] == 1.5
    assert {sum(x["scores"]) for x in records} == {4 * 128 * 129 // 2}
    json.dumps(records)
