"""The fuzzer: every kind of problem runs, all illegal calls are refused, and a failing problem is
printed as a program that fails again."""

import subprocess
import sys

import pytest

import fuzz


@pytest.mark.parametrize(
    ("argument", "change"),
    [(name, x) for name in fuzz.ARRAYS for x in fuzz.CHANGES]
    + [(name, x) for name, values in fuzz.NO_OPTION.items() for x in values],
)
def test_illegal_calls_are_refused(argument, change):
    fuzz.check_illegal(None, fuzz.Illegal(argument, change, 2, 7, 9, 4))


def test_a_legal_call_is_no_illegal_one():
    call = fuzz.Illegal("scale", 0.5, 2, 7, 9, 4)
    with pytest.raises(AssertionError, match="no error for"):
        fuzz.check_illegal(None, call)


@pytest.mark.parametrize("kind", ["values", "cached"])
def test_kinds(kind):
    chosen = fuzz.KINDS[kind]
    chosen.check(fuzz.implementation_here(), chosen.draw(5))


def test_problems_are_the_same_for_the_same_number_and_can_be_written_down():
    for kind in fuzz.KINDS.values():
        problem = kind.draw(12345)
        assert problem == kind.draw(12345) != kind.draw(12346)
        names = {type(problem).__name__: type(problem)}
        assert eval(repr(problem), names) == problem


def test_a_failing_problem_becomes_a_program(monkeypatch, tmp_path, capsys):
    """A legal call in the place of an illegal one."""
    monkeypatch.setattr(fuzz, "RUNNING", tmp_path / "fuzz.py")
    wrong = fuzz.Kind(lambda number: fuzz.Illegal("scale", 0.5, 1, 2, 3, 1), fuzz.check_illegal)
    monkeypatch.setitem(fuzz.KINDS, "illegal", wrong)
    assert fuzz.main(["--seconds", "60", "--seed", "3", "--kinds", "illegal"]) == 1
    printed = capsys.readouterr().out
    assert "seed 3" in printed and (tmp_path / "fuzz.py").read_text() in printed
    again = subprocess.run([sys.executable, tmp_path / "fuzz.py"], capture_output=True, text=True)
    assert again.returncode == 1 and "no error for Illegal" in again.stderr


def test_it_ends(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "RUNNING", tmp_path / "fuzz.py")
    assert fuzz.main(["--seconds", "0.2", "--kinds", "illegal"]) == 0
