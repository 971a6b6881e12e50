"""The GPU suite's record: it vouches for one source tree and for a run without failures."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "gpu/record.py"
COUNTS = {"passed": 300, "failed": 0, "skipped": 0}


@pytest.fixture(scope="module")
def record():
    spec = importlib.util.spec_from_file_location("gpu_record", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    """A small source tree, without a record."""
    for name in (
        "src/forward/kernel.cuh",
        "src/ffi/options.h",
        "cmake/kernels.cmake",
        "CMakeLists.txt",
        "jax_fa3/api.py",
        "tests/gpu/record.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}\n")
    return tmp_path


def write(record, tree, **changes):
    fields = {"source_hash": record.source_hash(tree), "counts": COUNTS} | changes
    (tree / record.RECORD).write_text(json.dumps(fields))


def test_a_fitting_record_has_no_problems(record, tree):
    write(record, tree)
    assert record.problems(tree) == []


@pytest.mark.parametrize(
    "name", ["src/forward/kernel.cuh", "src/ffi/options.h", "cmake/kernels.cmake", "CMakeLists.txt"]
)
def test_a_changed_source_is_a_problem(record, tree, name):
    write(record, tree)
    (tree / name).write_text("changed\n")
    assert "run `make gpu-test` again" in record.problems(tree)[0]


def test_added_and_renamed_sources_are_problems(record, tree):
    write(record, tree)
    (tree / "src/new.cuh").write_text("")
    assert record.problems(tree)
    (tree / "src/new.cuh").unlink()
    (tree / "src/ffi/options.h").rename(tree / "src/ffi/choices.h")
    assert record.problems(tree)


def test_other_files_are_not(record, tree):
    write(record, tree)
    (tree / "jax_fa3/api.py").write_text("changed\n")
    assert record.problems(tree) == []


@pytest.mark.parametrize("counts", [{"passed": 300, "failed": 1}, {"passed": 0, "failed": 0}, {}])
def test_a_run_that_did_not_pass_is_a_problem(record, tree, counts):
    write(record, tree, counts=counts)
    assert record.problems(tree)


def test_a_missing_or_broken_record_is_a_problem(record, tree):
    assert "make gpu-test" in record.problems(tree)[0]
    (tree / record.RECORD).write_text("{")
    assert "JSON" in record.problems(tree)[0]


def test_written_record_is_complete(record, tree):
    """What the GPU session writes, written here about this machine."""
    record.write(COUNTS, {"test_a": "why"}, 12.3, tree)
    written = json.loads((tree / record.RECORD).read_text())
    assert set(written) == {
        "date",
        "source_hash",
        "gpu",
        "driver",
        "platform",
        "python",
        "packages",
        "counts",
        "skipped",
        "seconds",
    }
    assert written["packages"]["jax"] and written["gpu"] and written["counts"] == COUNTS
    assert record.problems(tree) == []


def test_check_is_a_command_without_jax(record, tree):
    """Exit status and words, in a Python that has nothing installed."""
    (tree / "tests/gpu/record.py").write_text(SCRIPT.read_text())

    def check():
        return subprocess.run(
            [sys.executable, "-I", "-S", str(tree / "tests/gpu/record.py"), "--check"],
            capture_output=True,
            text=True,
        )

    assert check().returncode == 1
    write(record, tree)
    result = check()
    assert (result.returncode, "fits" in result.stdout) == (0, True), result.stderr
    write(record, tree, counts=COUNTS | {"failed": 2})
    assert check().returncode == 1 and "2 failed" in check().stdout
