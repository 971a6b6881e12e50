"""The doctor: what it says of a GPU that JAX does not use, and of flags that make no call."""

import glob
import sys

import pytest

import jax_fa3
from jax_fa3.doctor.__main__ import main

FLAGS = [
    ["--seqlen", "8", "--dtype", "nonsense"],
    ["--seqlen", "8", "--heads", "3", "--kv-heads", "2"],
    ["--seqlen", "8", "--kv-heads", "0"],
    ["--seqlen", "-8"],
    ["--seqlen", "8", "--window", "-1", "0"],
]


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_bad_flags(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["doctor", *flags])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_gpu_that_jax_does_not_use(monkeypatch, capsys):
    monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/nvidia0"])
    jax_fa3.doctor()
    said = capsys.readouterr().out
    assert "JAX does not use this machine's NVIDIA GPU" in said and "jax[cuda13]" in said
    assert "there is no NVIDIA GPU" not in said
