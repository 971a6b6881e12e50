"""benchmarks.decode on any machine: what its problems are, a run of small ones, what it reports."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import decode
from benchmarks.decode import Decode
from jax_fa3 import native

SMALL = dict(heads=4, kv_heads=2, head_dim=16)


def main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["decode", *map(str, arguments)])
    return decode.main()


def test_lowers_to_its_kernels(monkeypatch, capsys):
    """Each call of a chain, with its append where it has one."""
    plan = dict(workspace_bytes=4096, counters=8)
    monkeypatch.setattr(native, "IMPORT_ERROR", None)
    monkeypatch.setattr(native, "plan_forward_cached", lambda *call: plan)
    some = "^jax_fa3( forward)?:warm:(1-x-4k|prompt|64-x-1-to)"
    assert main(monkeypatch, "--dry-run", "--quick", "--filter", some) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.endswith(" lowered")]) == 5


def test_problems():
    problems = decode.problems()
    assert len({x.name for x in problems}) == len({x.label for x in problems}) == len(problems)
    by_name = {x.name: x for x in problems}
    plain = by_name["8 x 4k"]
    assert plain.bytes == 2 * 8 * 4096 * 8 * 128 * 2 and plain.goal_us == 36.5
    assert plain.copies("warm") == 1 and plain.copies("cold") == 2
    ragged = by_name["63 x 1k and 128k"]
    assert ragged.lengths.sum() == 63 * 1024 + 131072
    assert 0 < by_name["64 x 1 to 32k"].lengths.min() < 32768
    assert by_name["window of 1024"].bytes == plain.bytes // 4
    assert all(x.heads % x.kv_heads == 0 for x in problems)


def test_a_small_run(monkeypatch, tmp_path):
    """Answers are checked, caches go round, and every row is in the report."""
    rows = [
        Decode("plain", 2, 40, goal_us=3.0, **SMALL),
        Decode("pages", 2, 40, "uniform", page_size=8, appends=True, rows=2, window=9, **SMALL),
    ]
    monkeypatch.setattr(decode, "CALLS", 2)
    monkeypatch.setattr(decode, "problems", lambda: rows)
    monkeypatch.setattr(decode, "step_overhead", lambda: dict(step=50.0))
    some = "^xla:warm:plain|^jax_fa3:cold:pages"
    assert main(monkeypatch, "--rounds", 1, "--filter", some, "--output", tmp_path) == 0
    data = json.loads((tmp_path / "decode.json").read_text())
    assert len(data["records"]) == 2
    for record in data["records"]:
        assert record["error"] is None and record["wall_us"] > 0, record
    report = (tmp_path / "decode.md").read_text()
    assert "Wall time from Python, each waited for: step 50.0 us." in report
    for name in ("plain", "pages"):
        assert f"\n| {name} | " in report
    other = tmp_path / "merged"
    assert main(monkeypatch, "--merge", tmp_path / "decode.json", "--output", other) == 0
    assert (other / "decode.md").read_text() == report


def test_a_wrong_answer_is_an_error():
    """Of a call that forgets the lengths."""

    def build(problem, mode):
        def call(query, *caches, lengths):
            whole = {"cache_lengths": np.full(2, 40, np.int32)}
            return decode.ours(problem, mode)(query, *caches, lengths=whole)

        return call

    ours = dataclasses.replace(decode.IMPLEMENTATIONS[0], build=build)
    problem = Decode("", 2, 40, "uniform", **SMALL)
    inputs = problem.inputs()
    right = decode.DecodeProgram(decode.IMPLEMENTATIONS[0], problem, "warm")
    right.check_one(inputs, problem.reference(inputs))
    wrong = decode.DecodeProgram(ours, problem, "warm")
    with pytest.raises(ArithmeticError, match="wrong result: relative error"):
        wrong.check_one(inputs, problem.reference(inputs))
