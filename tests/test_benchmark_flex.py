"""benchmarks.flex on any machine: what its problems are, a run of small ones, what it reports."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

import jax_fa3
from benchmarks import first_call, flex, functions, torch_attention, torch_flex


def small():
    """Every problem of 4096 tokens, its sizes cut down."""
    return [
        dataclasses.replace(
            x,
            batch=2,
            seqlen=160,
            heads=4,
            head_dim=16,
            documents=(7, 100, 53) if x.documents else (),
            window=x.window and 50,
        )
        for x in functions.problems()
        if x.seqlen == 4096
    ]


def main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["flex", *map(str, arguments)])
    return flex.main()


def test_lowers_to_its_kernels(monkeypatch, capsys):
    assert main(monkeypatch, "--dry-run", "--quick", "--filter", "^jax_fa3") == 0
    lowered = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" lowered")]
    assert len(lowered) == 3 * 2 * 2  # functions, modes, two of ours


def test_names_tell_problems_apart():
    problems = list(functions.problems())
    names = {x.name for x in problems}
    assert len({(x.name, x.seqlen) for x in problems}) == len(problems)
    assert len({x.label for x in problems}) == len(problems)
    assert names >= {*flex.QUICK, *flex.WANTED, *flex.FIRST_CALLS, *flex.SAME_FOR_XLA}
    assert [len(x.documents) for x in problems if x.documents] == [6]
    assert {x.head_dim for x in problems} == {128}


def test_torch_has_the_same_numbers():
    assert (torch_flex.CAP, torch_flex.REACH) == (functions.CAP, functions.REACH)
    assert set(torch_flex.SCORES) <= functions.SCORES.keys()


@pytest.mark.parametrize("problem", small(), ids=lambda problem: problem.name)
def test_work_is_what_a_row_sees(problem):
    seen = np.ones((problem.seqlen, problem.seqlen), bool)
    _, mask = problem.functions(problem.captured())
    if mask:
        blocks = jax_fa3.create_block_mask(
            mask, None, None, *seen.shape, problem.captured(), block_size=1
        )
        seen = np.asarray(blocks.states[0, 0]) > 0
        assert not seen.all()
    row, column = np.ogrid[: problem.seqlen, : problem.seqlen]
    begin, end = (x[:, None] for x in problem.intervals())
    np.testing.assert_array_equal((begin <= column) & (column < end), seen)
    assert problem.pairs == problem.batch * seen.sum()
    _, dense = problem.dense()
    if dense is not None:
        np.testing.assert_array_equal(dense[0, 0], seen)


def test_a_small_run(monkeypatch, tmp_path):
    """Each answer is checked with the reference's."""
    problems = [x for x in small() if x.name not in ("softcap approx", "ALiBi", "causal")]
    monkeypatch.setattr(flex, "problems", lambda: problems)
    some = ":forward:|flex:backward:|:backward:table"
    arguments = ("--rounds", 1, "--budget-s", 600, "--filter", some, "--output")
    assert main(monkeypatch, *arguments, tmp_path) == 0
    data = json.loads((tmp_path / "flex.json").read_text())
    assert len(data["records"]) == (3 * len(problems) - 1) + len(problems) + 2  # no T5 of XLA's
    for record in data["records"]:
        assert record["error"] is None and record["wall_us"] > 0, record
    report = (tmp_path / "flex.md").read_text()
    header = "| function | tokens | jax_fa3 flex, us | over plain | wanted | over XLA, wanted 6 |"
    assert f"## Forward\n\n{header}" in report and f"## Backward\n\n{header}" in report
    other = tmp_path / "merged"
    assert main(monkeypatch, "--merge", tmp_path / "flex.json", "--output", other) == 0
    assert (other / "flex.md").read_text() == report


@pytest.mark.parametrize("name", ["ALiBi", "table", "window"])
def test_a_wrong_answer_is_an_error(name):
    problem = next(x for x in small() if x.name == name)
    wrong = lambda problem, mode: lambda *x: jax_fa3.dot_product_attention(*x[:3])  # noqa: E731
    ours = dataclasses.replace(flex.IMPLEMENTATIONS[0], build=wrong)
    inputs = problem.inputs()
    program = flex.FlexProgram(ours, problem, "forward")
    program.attempt(program.lower, "cpu")
    program.attempt(program.compile)
    program.attempt(program.load, inputs, problem.reference(inputs))
    assert "wrong result: relative error" in program.error


def test_kernels_are_named_and_not_linked():
    problem = small()[0]
    with flex.only_named() as found:
        query = jax.ShapeDtypeStruct((2, 160, 4, 64), "bfloat16")
        operands = problem.operands()
        attend = flex.ours(problem, "forward")
        lowered = jax.jit(lambda x: attend(x, x, x, *operands)).trace(query)
        lowered.lower(lowering_platforms=("cuda",))
    ((name, text),) = found
    assert name.startswith("forward_bf16_64_64_") and "jfa" in text


# Stand-ins for processes of their own.
FIRST_CALLS = """
import json, os, sys
request = json.load(sys.stdin)
path = request["folder"] + "/linked"
print(json.dumps(dict(seconds=0.5)), flush=True)
print(json.dumps(dict(seconds=1.5)), flush=True)
if os.path.exists(path):
    print(json.dumps(dict(error="no kernel")), flush=True)
open(path, "w")
sys.exit("ended")
"""
TORCH = """
import json, sys
for x in json.load(sys.stdin)["problems"]:
    refused = x["documents"] and dict(error="it does not compile")
    print(json.dumps(refused or dict(wall_us=[9.0], kernel_us=[8.0], relative_error=0.0)))
"""


def test_first_calls_and_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(first_call, "COMMAND", (sys.executable, "-c", FIRST_CALLS))
    monkeypatch.setattr(torch_flex, "COMMAND", (sys.executable, "-c", TORCH))
    args = flex.options("").parse_args(["--filter", "torch|first call:ALiBi"])
    environment = dict(device="a GPU")
    data = dict(environment=environment, records=[], skipped=[])
    flex.add_first_calls(data, args, 60)
    got = {(x["process"], x["name"], x["passes"]): x for x in data["first_calls"]}
    assert len(got) == 2 * 2 * 2
    assert got["linked", "dot_product_attention", "both"]["seconds"] == 1.5
    assert got["from the cache", "ALiBi", "forward"]["error"] == "no kernel"
    assert got["from the cache", "ALiBi", "both"]["error"] == "ended"
    monkeypatch.setattr(torch_attention, "absent", lambda: None)
    flex.add_torch(data, small(), args, 60)
    ours = [dict(x, implementation=flex.OURS, kernel_us=4.0) for x in data["records"][:2]]
    data["records"] += ours
    report = flex.markdown(flex.FlexResults(data))
    for line in (
        "| identity | 160 | 4 / 9 | - | 0.88 | 2.00 / 1.00 |",
        "| torch flex | forward | documents 160 | it does not compile |",
        "| dot_product_attention | 0.50 | 1.50 | 0.50 | 1.50 |",
        "| wanted at most | 6 | 12 | - | - |",
        "`-`: no kernel",
    ):
        assert line in report, report


def test_what_there_is_no_time_or_package_for(monkeypatch):
    args = flex.options("").parse_args([])
    data = dict(records=[], skipped=[])
    flex.add_first_calls(data, args, 0.0)
    monkeypatch.setattr(torch_attention, "absent", lambda: None)
    flex.add_torch(data, small()[:1], args, 0.0)
    assert data["skipped"][0] == "first call:identity"
    assert data["skipped"][-2:] == [f"torch flex:{x}:{small()[0].label}" for x in flex.MODES]
    monkeypatch.setattr(torch_attention, "absent", lambda: "no torch")
    flex.add_torch(data, small(), args, 60)
    assert data["no_torch"] == "no torch" and data["records"] == []
