"""The GPU suites' records: each vouches for one source tree and for a run without failures."""

import importlib.util
import json
import os
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


# Tests, and a conftest.py whose suite is in a tree of its own; "stop" ends the process.
INNER = {
    "conftest.py": """
import os, sys
sys.path.insert(0, os.environ["GPU_TESTS"])
import pathlib, importlib.util, pytest, record
record.ROOT = pathlib.Path(__file__).parent
record.driver_version = lambda: "1"
record.Progress.__init__.__defaults__ = record.write.__defaults__ = (record.ROOT,)
spec = importlib.util.spec_from_file_location("real", os.environ["GPU_TESTS"] + "/conftest.py")
real = importlib.util.module_from_spec(spec)
spec.loader.exec_module(real)
pytest_configure = real.pytest_configure
""",
    "tests/gpu/test_it.py": """
import os, pytest

@pytest.mark.parametrize("i", range(8))
def test_one(i):
    with open("ran", "a") as file:
        file.write(f"{i} ")
    if i == 2:
        pytest.skip("no")
    if i == 5 and os.path.exists("stop"):
        os._exit(3)
    assert i != 6 or not os.path.exists("fail")
""",
}


@pytest.fixture
def run_inner(tree):
    """Runs the small suite; its numbers that ran, the record if there is one, and the output."""
    for name, text in INNER.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)

    def run(*arguments):
        (tree / "ran").write_text("")
        (tree / "tests/gpu/RECORD.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        environment = dict(os.environ, GPU_TESTS=str(SCRIPT.parent), PYTHONDONTWRITEBYTECODE="1")
        done = subprocess.run(
            [*command, *(arguments or ["tests/gpu"])],
            cwd=tree,
            env={k: v for k, v in environment.items() if "XDIST" not in k},
            capture_output=True,
            text=True,
        )
        path = tree / "tests/gpu/RECORD.json"
        found = json.loads(path.read_text()) if path.exists() else None
        return sorted(map(int, (tree / "ran").read_text().split())), found, done.stdout

    return run


def test_a_run_that_was_ended_goes_on(run_inner, tree):
    (tree / "stop").touch()
    ran, found, _ = run_inner()
    assert ran == [0, 1, 2, 3, 4, 5] and found is None
    (tree / "stop").unlink()
    with (tree / "tests/gpu/RECORD.progress").open("a") as file:
        file.write('{"test": "tests/gpu/test_it.py::test_one[5]", "outco')  # while it was written
    ran, found, output = run_inner()
    assert ran == [5, 6, 7] and "5 tests were done by an earlier run" in output
    assert found["counts"] == dict(passed=7, failed=0, skipped=1)
    assert list(found["skipped"].values()) == ["Skipped: no"]
    assert not (tree / "tests/gpu/RECORD.progress").exists()
    assert run_inner()[0] == list(range(8))  # the next run is a whole one


def test_what_failed_in_a_run_that_was_ended_has_failed(run_inner, tree):
    (tree / "fail").touch()
    (tree / "tests/gpu/test_it.py").write_text(
        INNER["tests/gpu/test_it.py"].replace("i == 5 and", "i == 7 and")
    )
    (tree / "stop").touch()
    assert run_inner()[:2] == (list(range(8)), None)
    (tree / "fail").unlink()
    (tree / "stop").unlink()
    ran, found, _ = run_inner()
    assert ran == [7] and found["counts"] == dict(passed=6, failed=1, skipped=1)


@pytest.mark.parametrize("name", ["src/ffi/options.h", "jax_fa3/api.py", "tests/gpu/test_it.py"])
def test_another_tree_begins_anew(run_inner, tree, name):
    (tree / "stop").touch()
    run_inner()
    (tree / "stop").unlink()
    with (tree / name).open("a") as file:
        file.write("\n# changed\n")
    ran, found, _ = run_inner()
    assert ran == list(range(8)) and found["counts"]["passed"] == 7


def test_parts_of_a_suite_write_nothing(run_inner, tree):
    for arguments in (["tests/gpu", "-k", "3 or 4"], ["tests/gpu/test_it.py"]):
        assert run_inner(*arguments)[1] is None
    assert not (tree / "tests/gpu/RECORD.progress").exists()


def test_workers_share_the_progress(run_inner, tree):
    pytest.importorskip("xdist")
    (tree / "tests/gpu/RECORD.json").unlink(missing_ok=True)
    (tree / "stop").touch()
    run_inner("tests/gpu", "-n", "2", "--maxfail", "1")
    (tree / "stop").unlink()
    ran, found, _ = run_inner("tests/gpu", "-n", "2")
    assert 0 < len(ran) < 8 or found["counts"]["failed"]
    assert sum(found["counts"].values()) == 8


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
