"""benchmarks.bias on any machine: what its problems are, a run of small ones, what it reports."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jax_fa3
from benchmarks import bias, dense


def small():
    """Every problem, its sizes cut down; documents are short ones."""
    return [
        dataclasses.replace(
            x,
            batch=3,
            seqlen=160,
            heads=4,
            head_dim=16,
            kv_heads=2 if x.kv_heads else None,
        )
        for x in dense.dense_problems()
    ]


@pytest.fixture
def short_documents(monkeypatch):
    monkeypatch.setattr(dense, "DOCUMENTS", "lognormal-40")


def main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["bias", *map(str, arguments)])
    return bias.main()


def test_lowers_to_its_kernels(monkeypatch, capsys):
    assert main(monkeypatch, "--dry-run", "--quick", "--filter", "^jax_fa3( plain)?:") == 0
    lowered = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" lowered")]
    assert len(lowered) == (2 * 3 + 2 * 2) * 2  # biases' and masks' modes; two of ours


def test_names_tell_problems_apart():
    problems = dense.dense_problems()
    assert len({x.name for x in problems}) == len({x.label for x in problems}) == len(problems)
    assert set(bias.QUICK) | set(bias.SAID_PLAINLY) <= {x.name for x in problems}
    assert {name for name, _ in bias.WANTED_US} <= {x.name for x in problems}


@pytest.mark.parametrize("problem", small(), ids=lambda problem: problem.name)
def test_every_row_sees_a_key(problem, short_documents):
    mask = problem.arrays().get("mask", np.ones((1, 1, 1, 1), bool))
    shape = (problem.batch, problem.seqlen, problem.seqlen)
    seen = np.broadcast_to(mask[:, 0], shape)
    assert seen.any(-1).all()
    assert problem.pairs == pytest.approx(seen.sum(), rel=1e-6)
    assert problem.flops("gradients") == 3.5 * problem.flops("forward")
    if problem.mask not in (None, "padding"):
        assert not seen.all()


def test_a_small_run(monkeypatch, short_documents, tmp_path):
    """Each answer is checked with the reference's, also those to which a mask is told otherwise."""
    names = ("pair", "pair and key mask", "keys", "causal", "padding", "documents", "blocks")
    problems = [x for x in small() if x.name in names]
    monkeypatch.setattr(bias, "dense_problems", lambda: problems)
    some = "^jax_fa3( plain)?:forward:|^jax_fa3:gradients:keys|:gradients:pair-d"
    assert main(monkeypatch, "--rounds", 1, "--filter", some, "--output", tmp_path) == 0
    data = json.loads((tmp_path / "bias.json").read_text())
    ours = [x for x in data["records"] if x["implementation"] != "cudnn"]
    assert len(ours) == 7 + 6 + 1 + 4
    for record in ours:
        assert record["error"] is None and record["wall_us"] > 0, record
    report = (tmp_path / "bias.md").read_text()
    for line in (
        "| bias: speed over jax_fa3 xla | gradients | 1 |",
        "| mask: time over is_causal, lengths | forward | 2 |",
        "causal, forward: ",
        "## Bias, gradients\n\n| bias | shape | jax_fa3 | cuDNN | XLA |",
        "| cuDNN | gradients | pair |",  # not measured here
    ):
        assert line in report
    other = tmp_path / "merged"
    assert main(monkeypatch, "--merge", tmp_path / "bias.json", "--output", other) == 0
    assert (other / "bias.md").read_text() == report


def forgetful(keep):
    """jax_fa3 that keeps of a bias what `keep` returns."""

    def build(problem, mode):
        attend = jax_fa3.dot_product_attention
        return lambda *qkv, bias: attend(*qkv, bias=keep(bias), implementation="xla")

    return build


@pytest.mark.parametrize("keep", [lambda bias: None, jax.lax.stop_gradient])
def test_a_wrong_answer_is_an_error(keep):
    ours = dataclasses.replace(bias.IMPLEMENTATIONS[0], build=forgetful(keep))
    problem = small()[0]
    inputs = problem.inputs()
    program = bias.DenseProgram(ours, problem, "gradients")
    program.attempt(program.lower, "cpu")
    program.attempt(program.compile)
    program.attempt(program.load, inputs, problem.reference(inputs))
    assert "wrong result: relative error" in program.error
