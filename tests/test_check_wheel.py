"""tools/check_wheel.py on wheels made here, and on names and symbols that it has to refuse."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import check_wheel

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or shutil.which("nm") is None, reason="no C compiler or binutils"
)
NAME = "jax_fa3-1.0-cp312-abi3-manylinux_2_34_x86_64.whl"
MODULE = "jax_fa3/_C.abi3.so"


def make_library(folder, source="int PyInit__C(void) { return 1; }", *flags):
    path = folder / "library.so"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-x", "none", *flags, "-o", path]
    subprocess.run(command, input=source, text=True, check=True)
    return path


def make_wheel(folder, name=NAME, files=(MODULE,), library=None):
    """A wheel in which every shared library is `library`."""
    library = make_library(folder) if library is None else library
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr("jax_fa3/py.typed", "")
        for file in files:
            archive.write(library, file)
    return folder / name


def test_a_good_wheel(tmp_path):
    assert check_wheel.wheel_problems(make_wheel(tmp_path)) == []


@pytest.mark.parametrize(
    ("files", "name", "problem"),
    [
        ((MODULE, "jax_fa3.libs/libcudart.so.13"), NAME, "holds the libraries"),
        ((), NAME, "holds the libraries []"),
        ((MODULE,), NAME.replace("manylinux_2_34", "linux"), "expected manylinux_X_Y"),
        ((MODULE,), "jax_fa3-1.0.whl", "name is not that of a wheel"),
    ],
)
def test_files_and_names(tmp_path, files, name, problem):
    found = check_wheel.wheel_problems(make_wheel(tmp_path, name, files))
    assert len(found) == 1 and problem in found[0]


def test_a_large_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(check_wheel, "MAX_BYTES", 100)
    (found,) = check_wheel.wheel_problems(make_wheel(tmp_path))
    assert "at most 100 allowed" in found


def test_symbols_and_libraries(tmp_path):
    two = "int PyInit__C(void) { return 1; } int other(void) { return 2; }"
    (found,) = check_wheel.library_problems(make_library(tmp_path, two), (2, 34))
    assert found == "exports ['PyInit__C', 'other'], expected ['PyInit__C']"

    plain = "int PyInit__C(void) { return 1; }"
    library = make_library(tmp_path, plain, "-Wl,-soname,libcudart.so.13").rename(
        tmp_path / "libcudart.so.13"
    )
    flags = ("-Wl,--no-as-needed", library, "-Wl,-rpath,/opt")
    needs, searches = check_wheel.library_problems(make_library(tmp_path, plain, *flags), (2, 34))
    assert needs.startswith("needs ['libcudart.so.13']")
    assert searches.startswith("searches ['/opt']")


def test_a_newer_c_library(tmp_path):
    source = '#include <stdio.h>\nint PyInit__C(void) { return puts(""); }'
    library = make_library(tmp_path, source)
    assert check_wheel.library_problems(library, (2, 34)) == []
    (found,) = check_wheel.library_problems(library, (2, 1))
    assert "the wheel's tag promises 2.1" in found


def test_a_release_is_complete():
    names = [
        "jax_fa3-1.0.tar.gz",
        "jax_fa3-1.0-cp311-cp311-manylinux_2_34_x86_64.whl",
        NAME,
    ]
    assert check_wheel.set_problems(names) == []
    assert "0 source distributions" in check_wheel.set_problems(names[1:])[0]
    assert "wheels for ['cp312-abi3']" in check_wheel.set_problems([names[0], NAME])[0]
    other = [*names[:2], NAME.replace("1.0", "1.1")]
    assert check_wheel.set_problems(other) == ["versions ['1.0', '1.1'], expected one"]


@pytest.mark.parametrize(
    ("compiled", "wanted", "is_right"),
    [
        (9, "ALL", True),
        (8, "ALL", False),
        (1, "SOME", True),
        (0, "SOME", False),
        (0, "NONE", True),
        (1, "NONE", False),
    ],
)
def test_kernels(compiled, wanted, is_right):
    assert (check_wheel.kernel_problems(compiled, 9, wanted) == []) == is_right


def test_pythons():
    """abi3 wheels are for the Python that they name and newer ones, others for that one alone."""
    here, minor = sys.executable, sys.version_info.minor
    for first, is_for in ((minor, True), (minor - 1, True), (minor + 1, False)):
        tag = f"cp3{first}-abi3"
        assert check_wheel.python_for(tag, [here]) == (here if is_for else None)
        tag = f"cp3{first}-cp3{first}"
        assert check_wheel.python_for(tag, [here]) == (here if first == minor else None)
