"""The GPU suites' records: each vouches for one source tree and for a run without failures."""

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


@pytest.fixture(params=["gpu", "mesh"])
def suite(record, request):
    return record.SUITES[request.param]


@pytest.fixture
def tree(tmp_path):
    """A small source tree, without a record."""
    for name in (
        "src/kernels/forward/kernel.cuh",
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


def write(record, suite, tree, **changes):
    fields = {"source_hash": record.source_hash(suite, tree), "counts": COUNTS} | changes
    (tree / suite.record).write_text(json.dumps(fields))


def test_a_fitting_record_has_no_problems(record, suite, tree):
    write(record, suite, tree)
    assert record.problems(suite, tree) == []


@pytest.mark.parametrize(
    "name",
    [
        "src/kernels/forward/kernel.cuh",
        "src/ffi/options.h",
        "cmake/kernels.cmake",
        "CMakeLists.txt",
    ],
)
def test_a_changed_source_is_a_problem(record, suite, tree, name):
    write(record, suite, tree)
    (tree / name).write_text("changed\n")
    assert f"run `make {suite.target}` again" in record.problems(suite, tree)[0]


def test_added_and_renamed_sources_are_problems(record, suite, tree):
    write(record, suite, tree)
    (tree / "src/new.cuh").write_text("")
    assert record.problems(suite, tree)
    (tree / "src/new.cuh").unlink()
    (tree / "src/ffi/options.h").rename(tree / "src/ffi/choices.h")
    assert record.problems(suite, tree)


def test_the_package_is_a_source_of_what_runs_on_meshes_only(record, suite, tree):
    write(record, suite, tree)
    (tree / "tests/gpu/record.py").write_text("changed\n")
    assert record.problems(suite, tree) == []
    (tree / "jax_fa3/api.py").write_text("changed\n")
    assert bool(record.problems(suite, tree)) == (suite is record.SUITES["mesh"])


@pytest.mark.parametrize("counts", [{"passed": 300, "failed": 1}, {"passed": 0, "failed": 0}, {}])
def test_a_run_that_did_not_pass_is_a_problem(record, suite, tree, counts):
    write(record, suite, tree, counts=counts)
    assert record.problems(suite, tree)


def test_a_missing_or_broken_record_is_a_problem(record, suite, tree):
    assert f"make {suite.target}" in record.problems(suite, tree)[0]
    (tree / suite.record).write_text("{")
    assert "JSON" in record.problems(suite, tree)[0]


def test_written_record_is_complete(record, suite, tree):
    """What the GPU session writes, written here about this machine."""
    record.write(suite, COUNTS, {"test_a": "why"}, 12.3, tree)
    written = json.loads((tree / suite.record).read_text())
    assert set(written) == {
        "date",
        "source_hash",
        "gpu",
        "gpus",
        "driver",
        "platform",
        "python",
        "packages",
        "counts",
        "skipped",
        "seconds",
    }
    assert written["packages"]["jax"] and written["gpu"] and written["counts"] == COUNTS
    assert record.problems(suite, tree) == []


def test_check_is_a_command_without_jax(record, suite, tree):
    """Exit status and words, in a Python that has nothing installed."""
    name = next(name for name, known in record.SUITES.items() if known == suite)
    (tree / "tests/gpu/record.py").write_text(SCRIPT.read_text())

    def check():
        return subprocess.run(
            [sys.executable, "-I", "-S", str(tree / "tests/gpu/record.py"), "--check", name],
            capture_output=True,
            text=True,
        )

    assert check().returncode == 1
    write(record, suite, tree)
    result = check()
    assert (result.returncode, "fits" in result.stdout) == (0, True), result.stderr
    write(record, suite, tree, counts=COUNTS | {"failed": 2})
    assert check().returncode == 1 and "2 failed" in check().stdout
