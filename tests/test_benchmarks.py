"""Benchmarks that no test machine can run lower for the one that can."""

from benchmarks import float8


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
