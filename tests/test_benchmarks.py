"""Benchmarks that no test machine can run lower for the one that can; their counts are exact."""

import argparse
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention, float8, packed, render, torch_attention
from benchmarks.environment import PACKAGES
from benchmarks.implementations import IMPLEMENTATIONS, Implementation, available
from benchmarks.merge import merge, merged
from benchmarks.problems import (
    DOCUMENTS,
    FOURTEEN,
    HEAD_DIMS,
    PACKED_TOKENS,
    Packed,
    Padded,
    Problem,
    document_lengths,
    packed_grid,
    padded_grid,
)


def test_float8_lowers_to_its_kernels(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["float8", "--dry-run", "--seqlens", "1024"])
    assert float8.main() == 0
    lowered = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" lowered")]
    assert len([x for x in lowered if "cuDNN" not in x]) == 18  # 3 head_dims, 2 masks, 3 of ours


def test_a_float8_row_that_became_another_call_fails(monkeypatch):
    stray = float8.Implementation("float8", float8.fa3, target="jax_fa3_forward_float8")
    monkeypatch.setattr(float8, "OURS", (stray,))
    arguments = ["--dry-run", "--seqlens", "1024", "--filter", "^float8:.*d128-dense"]
    monkeypatch.setattr("sys.argv", ["float8", *arguments])
    assert float8.main() == 1


def test_packed_lowers_to_its_kernels(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["packed", "--dry-run", "--quick", "--filter", "^jax_fa3"])
    assert packed.main() == 0
    lowered = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" lowered")]
    assert len(lowered) == (3 * 2 + 1) * 2 * 2  # head_dims, masks and FOURTEEN; modes; two of ours


@pytest.mark.parametrize("tokens", PACKED_TOKENS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_documents_fill_the_sequence(documents, tokens):
    lengths = document_lengths(documents, tokens)
    kind, size = documents.split("-")
    assert sum(lengths) == tokens and min(lengths) > 0
    if kind == "lognormal":
        assert len(lengths) == tokens // int(size)
    elif kind == "equal":
        assert set(lengths) == {int(size)}
    else:
        assert lengths[0] == tokens // 2 and set(lengths[1:]) == {int(size)}


def test_lengths_that_do_not_divide():
    assert document_lengths("equal-300", 1000) == (300, 300, 300, 100)
    assert document_lengths("long-300", 1001) == (500, 300, 201)
    assert document_lengths("lognormal-5000", 1000) == (1000,)
    assert min(document_lengths("lognormal-2", 1000)) == 1
    with pytest.raises(ValueError, match="'other-3'; expected lognormal-"):
        document_lengths("other-3", 1000)


def test_fourteen_documents():
    assert len(FOURTEEN.lengths) == 14 and FOURTEEN.causal
    first, *_ = packed_grid(PACKED_TOKENS, HEAD_DIMS, DOCUMENTS, "bf16")
    assert first == (FOURTEEN, "forward")


@pytest.mark.parametrize("causal", [False, True])
def test_work_is_what_a_row_sees(causal):
    problem = Packed(1, 500, 3, 64, causal, documents="lognormal-60")
    ids, row = problem.segment_ids[0], np.arange(500)
    seen = (ids[:, None] == ids) & ((row <= row[:, None]) | (not causal))
    begin, end = problem.intervals()
    np.testing.assert_array_equal((begin[:, None] <= row) & (row < end[:, None]), seen)
    assert problem.flops("forward") == 4 * 3 * 64 * seen.sum()
    assert problem.flops("backward") == 10 * 3 * 64 * seen.sum()
    np.testing.assert_array_equal(np.diff(problem.cu_seqlens), problem.lengths)


def test_padded_batches():
    padded, full = (Padded(16, 1024, 2, 64, full=full) for full in (False, True))
    assert 768 <= padded.lengths.min() < padded.lengths.max() <= 1024
    assert set(full.lengths) == {1024}
    assert full.flops("backward") == Problem(16, 1024, 2, 64).flops("backward")
    assert padded.flops("forward") == 4 * 2 * 64 * float((padded.lengths.astype(int) ** 2).sum())
    labels = [f"{mode}:{x.label}" for x, mode in padded_grid(16384, 2048, (1024, 2048), "bf16")]
    assert len(set(labels)) == len(labels) == 3 * 2 * 2 * 2


@pytest.mark.parametrize(
    "problem",
    [
        Problem(2, 100, 2, 16, causal=True),
        Packed(1, 1100, 2, 16, documents="long-70"),
        Packed(1, 1100, 2, 16, causal=True, documents="lognormal-90"),
        Padded(3, 100, 2, 16),
    ],
    ids=lambda problem: problem.label,
)
def test_the_reference_has_the_problem_s_mask(problem):
    inputs = problem.inputs()
    *qkv, dout = (x[-1:].astype(jnp.float32) for x in inputs)
    begin, end = (x[:, None] for x in problem.intervals())
    column = np.arange(problem.seqlen)
    mask = (begin <= column) & (column < end)

    def attend(query, key, value):
        out = jax.nn.dot_product_attention(query, key, value, mask=mask[None, None])
        return jnp.where(mask.any(1)[:, None, None], out, 0)  # jax.nn: the mean of all values

    out, pullback = jax.vjp(attend, *qkv)
    want = [x[0, :, -1] for x in (out, *pullback(dout))]
    got, gradients = problem.reference(inputs)
    for a, b in zip((got, *gradients), want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def packed_run(commit="a"):
    """What a run of one problem leaves, with an implementation that refused it."""
    records = [
        dict(
            implementation=name, mode=mode, error=None, **vars(FOURTEEN),
            kernel_us=us, kernel_tflops=FOURTEEN.flops(mode) / us / 1e6,
        )
        for name, us in (("jax_fa3", 100.0), ("FA3", 150.0))
        for mode in ("forward", "backward")
    ]  # fmt: skip
    refused = dict(records[0], implementation="cuDNN mask", error="no")
    del refused["kernel_us"], refused["kernel_tflops"]
    environment = dict(device="a GPU", commit=commit, driver="1")
    return dict(environment=environment, records=[*records, refused], skipped=[])


def test_packed_report():
    report = packed.markdown(packed.PackedResults(packed_run()))
    where = "d128 causal lognormal-1170 in 16384"
    assert f"| jax_fa3 / FA3 | backward | kernel | 1 | 1.500 | 1.500 ({where})" in report
    assert "| jax_fa3 | kernel | 100 | 100 | 200 |" in report
    assert "## Not measured" in report


def test_packed_runs_become_one():
    other = packed_run()
    for record in other["records"]:
        record["head_dim"] = 64
    joined = merged([packed_run(), other])
    assert len(packed.PackedResults(joined).problems()) == 4
    with pytest.raises(ValueError, match="differ in commit, device or driver"):
        merged([packed_run(), packed_run(commit="b")])


def test_merged_runs_are_saved_with_their_report(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(packed_run()))
    report = merge([path, path], tmp_path / "packed.json", packed.write)
    assert (tmp_path / "packed.md").read_text() == report
    assert len(json.loads((tmp_path / "packed.json").read_text())["records"]) == 10


def test_columns_without_their_package_are_left_out_with_a_reason():
    log = []
    here, absent = (Implementation(x, None, package=x) for x in ("json", "no_such_package"))
    plain = Implementation("plain", None)
    assert available([absent, plain, here], log.append) == [plain, here]
    assert log == ["no_such_package: left out, the package no_such_package is not installed"]


def test_every_column_has_a_name_and_a_color():
    names = {x.name for x in IMPLEMENTATIONS} | {torch_attention.NAME}
    assert {"xla", "FA2", "triton", "cudnn", "FA3", "jax_fa3", "tokamax", "mosaic"} <= names
    assert names <= render.NAMES.keys() & render.COLORS.keys()
    assert {"dew-flash-attn-cu13", "tokamax", "torch"} <= set(PACKAGES)


# A stand-in for torch's process: the first problem's answer, and then what `end` does.
STUB = """
import json, sys, time
first, *_ = json.load(sys.stdin)["problems"]
assert first["mode"] == "forward" and first["seqlen"] == 512
answer = dict(wall_us=[3.0, 1.0, 2.0], kernel_us=[1.0, 1.0], relative_error=0.001)
print(json.dumps(answer), flush=True)
"""
TWO = [(Problem(2, 512, 4, 64), mode) for mode in ("forward", "backward")]


@pytest.mark.parametrize(
    ("end", "timeout_s", "why"),
    [
        ("sys.exit('no driver')", 60, "no driver"),
        ("print(json.dumps(dict(error='refused')))", 60, "refused"),
        ("time.sleep(60)", 2, "out of time after 2 s"),
    ],
)
def test_records_of_torch(end, timeout_s, why):
    command = (sys.executable, "-c", STUB + end)
    first, second = torch_attention.records(TWO, 3, timeout_s, command)
    assert (first["wall_us"], first["kernel_us"], first["error"]) == (2.0, 1.0, None)
    assert first["kernel_tflops"] == TWO[0][0].flops("forward") / 1e6
    assert (second["error"], second["mode"]) == (why, "backward") and "wall_us" not in second


def test_torch_is_a_column_of_the_grid(monkeypatch, tmp_path, capsys):
    args = argparse.Namespace(filter="FA2:forward", rounds=3, budget_s=60, output=tmp_path)
    environment = dict(device="a GPU", torch="2.9")
    data = dict(environment=environment, tokens=1024, hidden=256, records=[], skipped=[])
    monkeypatch.setattr(torch_attention, "absent", lambda: "the package torch is not installed")
    attention.add_torch(data, TWO, args)
    assert data["records"] == []
    assert "FA2: left out, the package torch is not installed" in capsys.readouterr().out
    monkeypatch.setattr(torch_attention, "absent", lambda: None)
    monkeypatch.setattr(torch_attention, "COMMAND", (sys.executable, "-c", STUB))
    attention.add_torch(data, TWO, args)
    saved = json.loads((tmp_path / "attention.json").read_text())
    assert len(saved["records"]) == 1
    report = render.markdown(render.Results(saved))
    assert "| FA2 (torch) |" in report and "| torch | 2.9 |" in report
